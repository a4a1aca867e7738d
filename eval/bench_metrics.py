"""The instruments themselves: coverage of intervals, memory of statistics, time of a Frechet distance.

    python eval/bench_metrics.py coverage     # how often 95 % intervals hold the truth: 2,000 simulations each
    python eval/bench_metrics.py memory       # 50,000 x 2,048 features: peak memory, all distances of sums
    python eval/bench_metrics.py time         # 2,000 images of digits-dit with their distance, on two threads

Writes eval/results/bench_metrics.json, one part per run.
"""

import argparse
import datetime
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quantdm import load_pipeline, load_protocol
from quantdm.files import read_json, write_json
from quantdm.machine import cores, fast_dtype, one_torch_thread, versions
from quantdm.metrics.distance import frechet_distance, frechet_of_moments
from quantdm.metrics.features import load_extractor
from quantdm.metrics.influence import frechet_influence
from quantdm.metrics.intervals import Interval, bootstrap_interval, draws_interval
from quantdm.metrics.moments import Moments
from quantdm.metrics.samples import Draw, compare, draw_samples
from quantdm.progress import bar

OUT = Path(__file__).parent / "results" / "bench_metrics.json"
SIMULATIONS, RESAMPLES = 2000, 400
MEMORY_IMAGES, MEMORY_FEATURES = 50_000, 2048


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
    """Return the peak memory of sums of 50,000 x 2,048 features, made batch by batch, and of their distance."""
    g = torch.Generator().manual_seed(0)
    before, start = _peak(), time.perf_counter()
    sums = None
    for _ in range(0, MEMORY_IMAGES, 500):  # as `feature_set` sums what comes out of an extractor
        some = Moments.of(torch.randn(500, MEMORY_FEATURES, generator=g))
        sums = some if sums is None else sums + some
    assert sums is not None
    summed = time.perf_counter()
    distance = frechet_of_moments(sums, Moments.of(torch.randn(4000, MEMORY_FEATURES, generator=g)))
    measured, streamed = time.perf_counter(), _peak()
    features = torch.empty(MEMORY_IMAGES, MEMORY_FEATURES)  # as they are kept for kernel distances
    for part in features.split(1000):
        part.normal_(generator=g)
    frechet_of_moments(Moments.of(features), sums)
    return {
        "features": [MEMORY_IMAGES, MEMORY_FEATURES],
        "peak_mib_after_imports": before,
        "peak_mib_sums_only": streamed,
        "peak_mib_features_kept": _peak(),
        "seconds_of_sums": summed - start,
        "seconds_of_distance": measured - summed,
        "distance": distance,
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def frechet_time() -> dict[str, Any]:
    """Return the time of 2,000 images of digits-dit by the shipped protocol and their distance to 2,000 others."""
    torch.set_num_threads(min(2, cores()))
    protocol = load_protocol("digits-dit")
    pipe = load_pipeline("digits-dit", torch_dtype=getattr(torch, fast_dtype()))
    extractor = load_extractor("digits")
    other = draw_samples(pipe, protocol, extractor, Draw(2, 2000, 5))
    start = time.perf_counter()
    mine = draw_samples(pipe, protocol, extractor, Draw(1, 2000, protocol.steps))
    figures = compare(mine, other)
    seconds = time.perf_counter() - start
    return {"images": 2000, "steps": protocol.steps, "seconds": seconds, "dtype": fast_dtype(), "fd": figures["fid_fp"]}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"coverage": coverage, "memory": memory, "time": frechet_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    part = parser.parse_args().part
    if part == "time":
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
