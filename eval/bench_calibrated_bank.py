"""What calibrated options cost beside data-free ones in the bank of a big denoiser, layer shape by layer shape.

    python eval/bench_calibrated_bank.py             # PixArt-XL/2: minutes to hours; run it again to go on
    python eval/bench_calibrated_bank.py --most 8    # ends after the shape during which 8 minutes are over

One layer of every shape of the public configuration, with random weights and correlated inputs, is quantized under the
nine data-free options of the paper and under the default options of a search, on one thread; seconds times the number
of such layers are the whole bank. Shapes that were not measured are scaled from the others by the seconds per weight of
the nearest row length, and named. Also measured: the choice over 25 options on SDXL (bars of dominated options, and the
knapsack). Writes eval/results/bench_calibrated_bank.json.
"""

import argparse
import datetime
import math
import platform
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import torch

from quantdm import list_layers, select
from quantdm.allocation.pruning import dominated
from quantdm.files import read_json, write_json
from quantdm.machine import cores, versions
from quantdm.quantizers import Moments, quantize_options
from quantdm.schemes import DEFAULT_OPTIONS, ORIGINAL, PAPER_OPTIONS, Scheme

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.architectures import PUBLIC
from tests.planted import planted_space

RESULT = Path(__file__).parent / "results" / "bench_calibrated_bank.json"
CALIBRATED = tuple(scheme for scheme in DEFAULT_OPTIONS if scheme != ORIGINAL)
MODEL, SEED, ROWS = "pixart-xl-2", 0, 2048
MANY = tuple(
    Scheme.parse(f"{kind}-{bits}")
    for kind in ("uniform-channel", "kmeans-channel", "kmeans-tensor")
    for bits in range(2, 9)
) + tuple(Scheme.parse(f"uniform-channel-{bits}-symmetric") for bits in range(2, 6))


def shapes() -> Counter[tuple[int, ...]]:
    """Return how many layers of the model have every shape."""
    kind, arguments = PUBLIC[MODEL]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**arguments)
    return Counter(layer.shape for layer in list_layers(model))


def measure(shape: tuple[int, ...]) -> dict[str, float]:
    """Return the seconds of one layer under both sets of options."""
    generator = torch.Generator().manual_seed(SEED)
    weight, columns = torch.randn(shape, generator=generator) * 0.02, math.prod(shape[1:])
    inputs = torch.randn(ROWS, columns, generator=generator) * torch.logspace(0, -1.5, columns)
    inputs[:, 1:] += 0.5 * inputs[:, :-1]
    moments, found = Moments((inputs.T @ inputs / ROWS)[None], ROWS), {}
    for name, options in (("data_free", PAPER_OPTIONS), ("calibrated", CALIBRATED)):
        start = time.process_time()
        quantize_options(weight, options, moments=moments)
        found[name] = round(time.process_time() - start, 2)
    return found


def selection() -> dict[str, float]:
    """Return the seconds of a choice over 25 options on SDXL."""
    space = planted_space(MANY, "sdxl")
    start = time.process_time()
    barred = dominated(space)
    between = time.process_time()
    for target in (2.5, 3.0, 3.5):
        select(space, -space.noise_error, target_bits=target, forbidden=barred)
    return {
        "options": len(MANY),
        "layers": len(space.layers),
        "bars_s": round(between - start, 2),
        "knapsack_s": round((time.process_time() - between) / 3, 2),
    }


def whole(counts: Counter[tuple[int, ...]], rows: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return the seconds of the whole bank on one core, and which shapes were not measured."""
    known = {shape: rows[str(list(shape))] for shape in counts if str(list(shape)) in rows}
    total: Counter[str] = Counter()
    for shape, count in counts.items():
        near = min(known, key=lambda other: abs(math.log(math.prod(other[1:]) / math.prod(shape[1:]))))
        scale = math.prod(shape) / math.prod(near)
        total += Counter({name: count * seconds * scale for name, seconds in known[near].items()})
    return {
        "data_free_s": round(total["data_free"], 1),
        "calibrated_s": round(total["calibrated"], 1),
        "ratio": round(total["calibrated"] / total["data_free"], 2),
        "hours_on_two_cores": round(total["calibrated"] / 2 / 3600, 2),
        "share_of_weights_measured": round(
            sum(math.prod(s) * counts[s] for s in known) / sum(math.prod(s) * n for s, n in counts.items()), 3
        ),
        "scaled_from_others": [list(shape) for shape in counts if shape not in known],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=float, default=math.inf, help="minutes after which no further shape is begun")
    end = time.monotonic() + 60 * parser.parse_args().most
    torch.set_num_threads(1)
    record: dict[str, Any] = read_json(RESULT) if RESULT.is_file() else {"rows": {}}
    record |= {
        "model": MODEL,
        "seed": SEED,
        "options": {"data_free": [s.label for s in PAPER_OPTIONS], "calibrated": [s.label for s in CALIBRATED]},
        "seconds": "of processor time, one thread",
        "selection_sdxl": selection(),
        "machine": f"{platform.machine()}, {cores()} cores",
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }
    counts = shapes()
    for shape in sorted(counts, key=math.prod):
        if str(list(shape)) not in record["rows"] and time.monotonic() < end:
            record["rows"][str(list(shape))] = {"layers": counts[shape], **measure(shape)}
            record["whole"] = whole(counts, record["rows"])
            write_json(RESULT, record)
            print(shape, counts[shape], record["rows"][str(list(shape))], flush=True)
    print(record["whole"], record["selection_sdxl"])


if __name__ == "__main__":
    main()
