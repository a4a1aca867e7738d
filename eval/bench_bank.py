"""Build the bank of a big denoiser, made from its public configuration with random bf16 weights, and measure it.

    python eval/bench_bank.py                    # PixArt-XL/2, 610 M weights: minutes; needs 2 GB on disk
    python eval/bench_bank.py --model sdxl       # 2.57 G weights: needs 8 GB on disk and 8 GB of memory

Prints a table and writes eval/results/bench_bank_MODEL.json. The options are the six of the paper.
"""

import argparse
import datetime
import gc
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers
import torch

from quantdm import get_denoiser, list_layers, load_pipeline
from quantdm.bank.weight_bank import WeightBank
from quantdm.files import write_json
from quantdm.machine import cores, versions
from quantdm.pipelines.known import known_pipelines
from quantdm.progress import bar
from quantdm.quantizers import count_bits
from quantdm.schemes import Scheme

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.architectures import PUBLIC  # the configurations that the tests count layers of

OUT = Path(__file__).parent / "results"
OPTIONS = tuple(
    Scheme.parse(f"{kind}-{bits}") for kind in ("uniform-channel", "kmeans-channel", "kmeans-tensor") for bits in (3, 4)
)
SEED, SWAPS = 0, 5


def memory(field: str) -> float:
    """Return a figure of this process in GB: VmRSS (now) or VmHWM (the highest since `forget_peak`)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e9
    raise KeyError(field)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def random_denoiser(name: str) -> torch.nn.Module:
    """Build a denoiser from its public configuration; every parameter is drawn from N(0, 0.02^2)."""
    kind, arguments = PUBLIC[name]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**arguments)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(SEED)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
    return model.eval().requires_grad_(False)


def swap_seconds(bank: WeightBank, denoiser: torch.nn.Module) -> dict[str, float]:
    """Time a whole configuration in and out again: the first time (decoded then), and when its weights are kept."""
    times = []
    for _ in range(SWAPS + 1):
        start = time.monotonic()
        with bank.applied(denoiser, dict.fromkeys(bank.layers, Scheme.parse("kmeans-channel-4"))):
            times.append(time.monotonic() - start)
    return {
        "first_s": round(times[0], 4),
        "again_s": round(min(times[1:]), 5),
        "again_s_worst": round(max(times[1:]), 5),
    }


def build(denoiser: torch.nn.Module, folder: Path, workers: int) -> dict[str, Any]:
    """Build the bank; return times, memory and sizes."""
    layers = list_layers(denoiser)
    weights = sum(layer.num_weights for layer in layers)
    gc.collect()
    forget_peak()
    before, load, wall, cpu = memory("VmRSS"), os.getloadavg(), time.monotonic(), time.process_time()
    bank = WeightBank(folder, layers, OPTIONS, cache_bytes=2**33)
    with bar(weights, "bank: weights x options") as progress:
        bank.build(denoiser, workers=workers, progress=progress.update)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    peak, end = memory("VmHWM"), memory("VmRSS")
    counted = sum(count_bits(la.shape, scheme, la.split) for la in layers for scheme in OPTIONS) / 8
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    start = time.monotonic()
    WeightBank(folder, layers, OPTIONS).build(denoiser, workers=workers)
    return {
        "layers": len(layers),
        "weights": weights,
        "largest_layer": max(layer.num_weights for layer in layers),
        "workers": workers,
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "cpu_ns_per_weight": round(cpu / weights * 1e9, 1),
        "cpu_minutes_over_two_cores": round(cpu / 2 / 60, 2),
        "load_average_before": [round(x, 1) for x in load],
        "load_average_after": [round(x, 1) for x in os.getloadavg()],
        "peak_gb_beyond_the_model": round(peak - before, 3),
        "kept_gb_after": round(end - before, 3),
        "bank_gb": round(stored / 1e9, 4),
        "counted_gb": round(counted / 1e9, 4),
        "stored_over_counted": round(stored / counted, 5),
        "build_again_s": round(time.monotonic() - start, 1),
        "swap": swap_seconds(bank, denoiser),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pixart-xl-2", choices=sorted(PUBLIC))
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--folder", type=Path, help="where the bank lies meanwhile (default: a temporary folder)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="bench_bank.", dir=arguments.folder))
    record: dict[str, Any] = {"model": arguments.model, "options": [scheme.label for scheme in OPTIONS], "seed": SEED}
    try:
        record |= build(random_denoiser(arguments.model), folder / "big", arguments.workers)
        record["reference_pipelines"] = {}
        for name in known_pipelines():
            denoiser = get_denoiser(load_pipeline(name))
            bank = WeightBank(folder / name, list_layers(denoiser), OPTIONS).build(denoiser, workers=arguments.workers)
            record["reference_pipelines"][name] = swap_seconds(bank, denoiser)
    finally:
        shutil.rmtree(folder)
    record |= {
        "machine": f"{platform.machine()}, {cores()} cores",
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(record, indent=1))
    write_json(OUT / f"bench_bank_{arguments.model}.json", record)


if __name__ == "__main__":
    main()
