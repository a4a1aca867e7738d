"""The instruments themselves: coverage of intervals, memory of statistics, time of a Frechet distance.

    python eval/bench_metrics.py coverage     # how often 95 % intervals hold the truth: 2,000 simulations each
    python eval/bench_metrics.py memory       # 50,000 x 2,048 features: peak memory, kept on disk, distances and KID
    python eval/bench_metrics.py time         # 2,000 images of digits-dit with their distance, on two threads
    python eval/bench_metrics.py time_of_one_thread

Writes eval/results/bench_metrics.json, one part per run.
"""

import argparse
import datetime
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from quantdm.files import read_json, write_json
from quantdm.machine import cores, fast_dtype, one_torch_thread, versions
from quantdm.metrics.distance import frechet_distance, frechet_of_moments
from quantdm.metrics.feature_sets import feature_set
from quantdm.metrics.features import FeatureSpace, Kind, load_extractor
from quantdm.metrics.images import ImageSet
from quantdm.metrics.influence import frechet_influence
from quantdm.metrics.intervals import Interval, bootstrap_interval, draws_interval
from quantdm.metrics.kernels import kid
from quantdm.progress import bar

OUT = Path(__file__).parent / "results" / "bench_metrics.json"
SIMULATIONS, RESAMPLES = 2000, 400
MEMORY_IMAGES, MEMORY_FEATURES, MEMORY_OTHERS, MEMORY_SUBSETS = 50_000, 2048, 4000, 10


# ------------------------------------------------------------------------------------------------------------ coverage


def skewed_means(g: torch.Generator) -> tuple[Interval, float]:
    """Mean of skewed paired differences, three draws of 60 images; the large part that both rows share cancels."""
    shared = 5 * torch.randn(3, 60, generator=g)
    gap = (shared + torch.empty(3, 60).exponential_(generator=g)) - shared
    return bootstrap_interval(
        lambda index: float(sum(gap[d][i].mean() for d, i in enumerate(index)) / 3), [60] * 3, resamples=RESAMPLES,
        seed=int(torch.randint(2**31, (1,), generator=g)),
    ), 1.0  # fmt: skip


def frechet_differences(g: torch.Generator) -> tuple[Interval, float]:
    """Difference of two Frechet distances to one reference, 8 features, three draws of 300 paired images."""
    noise = 0.3 * torch.randn(2, 900, 8, generator=g)
    full = torch.randn(900, 8, generator=g)
    rows = [full * scale + shift + e for scale, shift, e in zip((1.1, 0.8), (0.2, 0.1), noise, strict=True)]
    each, found = [], []
    for part in range(3):
        at = slice(300 * part, 300 * part + 300)
        values = []
        for row in rows:
            own, other = frechet_influence(row[at], full[at])
            values.append(own + other + frechet_distance(row[at], full[at]))
        each.append(values[0] - values[1])
        found.append(values[0].mean() - values[1].mean())
    interval = bootstrap_interval(
        lambda index: float(sum(e[i].mean() for e, i in zip(each, index, strict=True)) / 3), [300] * 3,
        resamples=RESAMPLES, seed=int(torch.randint(2**31, (1,), generator=g)),
    )  # fmt: skip
    return interval, FRECHET_TRUTH


def _true_difference() -> float:
    # diagonal Gaussians: |shift|^2 + (sd - 1)^2 per feature, sd = sqrt(scale^2 + .3^2); the bias of 300 images is told
    sds = [(scale**2 + 0.09) ** 0.5 for scale in (1.1, 0.8)]
    return 8 * (0.2**2 + (sds[0] - 1) ** 2 - 0.1**2 - (sds[1] - 1) ** 2)


FRECHET_TRUTH = _true_difference()


def few_draws(g: torch.Generator) -> tuple[Interval, float]:
    """Mean of three draws that differ by more than their images do: the t interval over draws."""
    draws = 1 + 0.5 * torch.randn(3, generator=g) + torch.randn(3, 100, generator=g).mean(1)
    return draws_interval(draws.tolist()), 1.0


CASES: dict[str, Callable[[torch.Generator], tuple[Interval, float]]] = {
    "paired mean, skewed, 3 draws of 60 images": skewed_means,
    "difference of Frechet distances, 8 features, 3 draws of 300 images": frechet_differences,
    "mean of 3 draws with effects of their own": few_draws,
}


def coverage() -> dict[str, Any]:
    """Return how often each interval holds the truth, and how far estimates are off on average."""
    found = {}
    for name, simulate in CASES.items():
        hits, off = 0, 0.0
        with bar(SIMULATIONS, name) as progress:
            for seed in range(SIMULATIONS):
                interval, truth = simulate(torch.Generator().manual_seed(seed))
                hits += interval.low <= truth <= interval.high
                off += (interval.estimate - truth) / SIMULATIONS
                progress.update()
        found[name] = {"coverage": hits / SIMULATIONS, "bias": off, "simulations": SIMULATIONS}
        print(name, found[name], flush=True)
    return found


# ------------------------------------------------------------------------------------------------------ memory, time


def memory() -> dict[str, Any]:
    """Return the peak memory of 50,000 x 2,048 features, kept and summed batch by batch, their distances, and KID.

    Everything goes the way of `quantdm evaluate fid`: images (small noise), an extractor, the cache on disk.
    """
    g = torch.Generator().manual_seed(0)

    def noise(count: int) -> ImageSet:
        def batches() -> Iterator[torch.Tensor]:
            for start in range(0, count, 500):
                yield torch.randint(256, (min(500, count - start), 3, 8, 8), generator=g, dtype=torch.uint8)

        return ImageSet(f"noise-{count}", tuple(f"{i:06d}" for i in range(count)), batches, lambda: str(count))

    space = FeatureSpace(
        "noise", Kind("FD-noise", "none", "random numbers"), "none",
        lambda images: torch.randn(len(images), MEMORY_FEATURES, generator=g),
    )  # fmt: skip
    before, start = _peak(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, own_cache(folder):
        few = feature_set(noise(MEMORY_OTHERS), space, keep=True)
        many = feature_set(noise(MEMORY_IMAGES), space, keep=True)
        extracted, peak_of_features = time.perf_counter(), _peak()
        distance = frechet_of_moments(many.moments, few.moments)
        measured, peak_of_distance = time.perf_counter(), _peak()
        assert many.features is not None
        assert few.features is not None
        subsets = kid(many.features, few.features, subsets=MEMORY_SUBSETS)[0]
    return {
        "features": [MEMORY_IMAGES, MEMORY_FEATURES],
        "peak_mib_after_imports": before,
        "peak_mib_features_kept_and_cached": peak_of_features,
        "peak_mib_with_distance": peak_of_distance,
        "peak_mib_with_kid": _peak(),
        "seconds_of_features": extracted - start,
        "seconds_of_distance": measured - extracted,
        "distance": distance,
        "kid": subsets,
    }


@contextmanager
def own_cache(folder: str) -> Iterator[None]:
    """Let statistics be kept in a folder of their own."""
    before = os.environ.get("QUANTDM_CACHE")
    os.environ["QUANTDM_CACHE"] = folder
    try:
        yield
    finally:
        os.environ.pop("QUANTDM_CACHE")
        if before is not None:
            os.environ["QUANTDM_CACHE"] = before


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def frechet_time(threads: int) -> dict[str, Any]:
    """Return the time of 2,000 images of digits-dit by the shipped protocol and their distance to 2,000 others."""
    from quantdm import load_pipeline, load_protocol  # not before: `memory` is what measuring folders takes
    from quantdm.metrics.samples import Draw, compare, draw_samples

    torch.set_num_threads(threads)
    protocol = load_protocol("digits-dit")
    pipe = load_pipeline("digits-dit", torch_dtype=getattr(torch, fast_dtype()))
    extractor = load_extractor("digits")
    other = draw_samples(pipe, protocol, extractor, Draw(2, 2000, 5))
    start, used = time.perf_counter(), time.process_time()
    mine = draw_samples(pipe, protocol, extractor, Draw(1, 2000, protocol.steps))
    figures = compare(mine, other)
    return {
        "images": 2000,
        "steps": protocol.steps,
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - used,  # of all threads: what other work beside it does not change
        "load_of_the_machine": os.getloadavg()[0],
        "dtype": fast_dtype(),
        "fd": figures["fid_fp"],
    }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "coverage": coverage,
    "memory": memory,
    "time": lambda: frechet_time(min(2, cores())),
    "time_of_one_thread": lambda: frechet_time(1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    part = parser.parse_args().part
    if part.startswith("time"):
        found = PARTS[part]()
    else:
        with one_torch_thread():
            found = PARTS[part]()
    record: dict[str, Any] = read_json(OUT) if OUT.is_file() else {"version": 1}
    found["machine"] = f"{platform.machine()}, {_processor()}, {cores()} cores"
    record[part] = {**found, "date": datetime.date.today().isoformat()}
    record["versions"] = versions()
    write_json(OUT, record)
    print(record[part])


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
