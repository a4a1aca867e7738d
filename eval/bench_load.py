"""Measure memory and time of loading an export beside the bf16 original, PixArt-XL/2-sized, random weights.

    python eval/bench_load.py        # five minutes, 2 GB of disk; writes eval/results/bench_load.json

Every load runs in a fresh process; the files are in the page cache. Memory is the peak resident set (VmHWM) minus that
of a process that only imports. It counts the pages of the memory-mapped file, which the kernel takes back when it needs
them; `anonymous` is what it cannot take back: the highest of samples every two milliseconds. The checksums make loading
read all of the export; a bf16 file is mapped and not read, so `seconds_read` is the time until every weight has been
touched once. `cpu_seconds` is the time of the loading thread on a core, whatever else the machine is doing.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file

from quantdm import QuantConfig, QuantizedWeight, Scheme, apply_recipe, list_layers, quantize_weight
from quantdm.files import write_json
from quantdm.hub.header import checksum
from quantdm.machine import versions

OUT = Path(__file__).parent / "results" / "bench_load.json"
PIXART = {"sample_size": 64, "caption_channels": 4096, "use_additional_conditions": False}  # PixArt-XL-2-512x512
MIX = ("uniform-channel-4", "kmeans-channel-4", "uniform-channel-3", "kmeans-tensor-4")
REPEATS = 5
LIMIT_FACTOR, LIMIT_MB = 1.25, 500
MB = 1e6


class ShapeBank:
    """Quantizes one layer of every shape and scheme: loading does not care that random codes repeat."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.splits = model, {layer.name: layer.split for layer in list_layers(model)}
        self.memory: dict[tuple, QuantizedWeight] = {}

    def get(self, layer_name: str, scheme: Scheme) -> QuantizedWeight:
        """Return the weight of the first layer that was alike."""
        weight = self.model.get_parameter(f"{layer_name}.weight").detach()
        key = (tuple(weight.shape), scheme, self.splits[layer_name])
        if key not in self.memory:
            self.memory[key] = quantize_weight(weight, scheme, split=key[2])
        return self.memory[key]

    def other(self, parameter_name: str) -> None:
        """Leave what is not quantized as it is."""


def build(folder: Path) -> dict[str, float]:
    """Save a random model in bf16 and its export; return their sizes in bytes."""
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(**PIXART).bfloat16()
    model.save_pretrained(folder / "bf16")
    names = [layer.name for layer in list_layers(model)]
    config = QuantConfig({name: Scheme.parse(MIX[i % len(MIX)]) for i, name in enumerate(names)})
    apply_recipe(model, config, bank=ShapeBank(model), insist=True)
    model.save_pretrained(folder / "export")
    return {name: sum(f.stat().st_size for f in (folder / name).glob("*.safetensors")) for name in ("bf16", "export")}


def status(key: str) -> int:
    """Return a figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def anonymous() -> int:
    """Return the memory of this process that belongs to no file, in bytes."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def child(what: str, folder: Path) -> None:
    """Load once and print the figures."""
    peak, done = anonymous(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    if what == "import":
        print(json.dumps({"peak": status("VmHWM"), "anonymous": peak}))
        return
    watcher = threading.Thread(target=watch)
    watcher.start()
    start, cpu = time.perf_counter(), time.thread_time()
    model = PixArtTransformer2DModel.from_pretrained(folder / what, dtype=torch.bfloat16)
    loaded, cpu = time.perf_counter() - start, time.thread_time() - cpu
    for tensor in model.state_dict().values():
        tensor.reshape(-1).view(torch.uint8)[::4096].sum()
    read = time.perf_counter() - start
    done.set()
    watcher.join()
    figures = {"seconds": loaded, "read": read, "cpu": cpu, "peak": status("VmHWM"), "anonymous": peak}
    if what == "export":
        tensors = load_file(next((folder / what).glob("*.safetensors")))
        start = time.thread_time()
        for key, tensor in tensors.items():
            checksum(key, tensor)
        figures["checksums"] = time.thread_time() - start
    print(json.dumps(figures))


def run_child(what: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", what, str(folder)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Return the medians of every figure, the three kinds of process in turn."""
    kinds = ("import", "bf16", "export")
    for what in kinds:
        run_child(what, folder)  # fills the page cache
    runs = [{what: run_child(what, folder) for what in kinds} for _ in range(REPEATS)]
    return {what: {key: statistics.median(run[what][key] for run in runs) for key in runs[0][what]} for what in kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], Path(arguments.child[1]))
        return
    with tempfile.TemporaryDirectory(prefix="quantdm-load-") as temporary:
        sizes = build(Path(temporary))
        found = measure(Path(temporary))
    rows = {}
    for what, size in sizes.items():
        rows[what] = {
            "file_mb": round(size / MB, 1),
            "peak_mb": round((found[what]["peak"] - found["import"]["peak"]) / MB, 1),
            "anonymous_mb": round((found[what]["anonymous"] - found["import"]["anonymous"]) / MB, 1),
            "seconds": round(found[what]["seconds"], 3),
            "seconds_read": round(found[what]["read"], 3),
            "cpu_seconds": round(found[what]["cpu"], 3),
        }
    load = os.getloadavg()[0]
    limit = LIMIT_FACTOR * sizes["export"] / MB + LIMIT_MB
    record = {
        "model": f"PixArtTransformer2DModel {PIXART}, random weights, schemes {', '.join(MIX)} in turn",
        "rows": rows,
        "peak_limit_mb": round(limit, 1),
        "within_limit": rows["export"]["peak_mb"] <= limit,
        "checksums": {
            "cpu_seconds": round(found["export"]["checksums"], 3),
            "ns_per_byte": round(found["export"]["checksums"] / sizes["export"] * 1e9, 3),
        },
        "medians_of": REPEATS,
        "dtype": "bfloat16",
        "page_cache": "warm",
        "versions": versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {load:.1f}",
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(record, indent=1))
    write_json(OUT, record)


if __name__ == "__main__":
    main()
