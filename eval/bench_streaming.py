"""Measure inspect and apply on big denoisers with random weights: seconds and peak memory of the command.

    python eval/bench_streaming.py sdxl --folder DIR             # 2.57 G weights: 7 GB of disk, ten minutes
    python eval/bench_streaming.py flux --folder DIR --keep      # 11.9 G weights: 31 GB of disk, half an hour

The folder is a bare one of diffusers (config.json and bf16 shards), made tensor by tensor. Every command runs in a
process of its own; its peak is the highest resident set, imports and pages of mapped files included. Every `apply` is
killed after some seconds, once or (--slice) again and again, and started again until it is done: what all processes
took together is what one would. Figures go to eval/results/bench_streaming.json, one entry per model.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import torch

from quantdm.files import read_json, write_json
from quantdm.hub.shards import Shards
from quantdm.machine import cores, memory_gb, versions

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.architectures import PUBLIC

OUT = Path(__file__).parent / "results" / "bench_streaming.json"
MODELS = {"sdxl": ("sdxl", ("uniform-channel-4", "kmeans-channel-4")), "flux": ("flux.1-dev", ("uniform-channel-4",))}
COMMAND = [sys.executable, "-c", "from quantdm.cli.main import main; main()"]
POOL = 2**25 + 1
PATTERN, SHARD = "diffusion_pytorch_model{suffix}.safetensors", "10GB"


def make(name: str, folder: Path) -> int:
    """Write a denoiser with weights from N(0, 0.02^2) in bf16; return how many it has.

    Every tensor is a window of one pool of draws: to draw twelve billion would take longer than to quantize them.
    """
    kind, arguments = PUBLIC[name]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**arguments)
    state = {key: tensor.to(torch.bfloat16) for key, tensor in model.state_dict().items()}
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        shards = Shards(folder, state, PATTERN, SHARD, {"format": "pt"})
        pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
        for number, (key, tensor) in enumerate(state.items()):
            shards.write(key, window(pool, 7919 * number, tensor.numel()).view(tensor.shape))
        shards.finish({"format": "pt"})
        if shards.is_sharded:
            write_json(
                folder / f"{PATTERN.format(suffix='')}.index.json",
                {"metadata": shards.metadata, "weight_map": shards.weight_map},
            )
        model.save_config(folder)
    return sum(tensor.numel() for tensor in state.values())


def window(pool: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Return `count` entries of a pool from `start` on; after its end it begins again."""
    start %= len(pool)
    whole, rest = divmod(max(start + count - len(pool), 0), len(pool))
    return torch.cat([pool[start : start + count], *[pool] * whole, pool[:rest]])


def measure(arguments: list[str], kill_after: float | None = None) -> dict[str, float]:
    """Run a command of quantdm; return its seconds and its peak in GB. With `kill_after` it is killed then."""
    start = time.monotonic()
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pid, status, usage = 0, 0, None
    while pid == 0:
        if kill_after is not None and time.monotonic() - start > kill_after:
            process.send_signal(signal.SIGKILL)
            kill_after = None
        time.sleep(0.05)
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    assert usage is not None
    if os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
        raise SystemExit(f"quantdm {' '.join(arguments)} failed")
    return {
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 3),
    }


def export(folder: Path, scheme: str, out: Path, kill_after: float, slice_: float | None) -> dict[str, Any]:
    """Measure an export that is killed and started again until it is done; the processes do the work of one."""
    recipe = out.with_suffix(".yaml")
    recipe.write_text(f"version: 1\nmodel: random\ndefault: {scheme}\nprovenance: {{source: bench}}\n")
    command = ["apply", str(folder), "--recipe", str(recipe), "-o", str(out)]
    pieces = [measure(command, kill_after)]
    if out.exists():
        raise SystemExit(f"{out} was finished before it was killed; give a smaller --kill-after")
    while not out.exists():
        pieces.append(measure(command, slice_))
    size = sum(path.stat().st_size for path in out.glob("*.safetensors")) / 1e9
    shutil.rmtree(out)
    recipe.unlink()
    totals = {key: round(sum(piece[key] for piece in pieces), 1) for key in ("seconds", "cpu_seconds")}
    peak = max(piece["peak_gb"] for piece in pieces)
    return {**totals, "peak_gb": peak, "killed": len(pieces) - 1, "file_gb": round(size, 3), "processes": pieces}


def main() -> None:
    """Measure one model and add it to the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--folder", type=Path, required=True, help="where the model and its exports are written")
    parser.add_argument("--keep", action="store_true", help="keep the model")
    parser.add_argument("--alone", action="store_true", help="nothing else runs on this machine")
    parser.add_argument("--kill-after", type=float, default=60, help="seconds after which every export is killed once")
    parser.add_argument("--slice", type=float, help="and again after so many, until they are done")
    arguments = parser.parse_args()
    name, schemes = MODELS[arguments.model]
    folder = arguments.folder / arguments.model
    weights = make(name, folder)
    record = {
        "model": f"{name}, random bf16 weights",
        "weights": weights,
        "file_gb": round(sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9, 3),
        "inspect": measure(["inspect", str(folder)]),
        "exports": {},
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": cores(), "memory_gb": memory_gb()},
        "other work on the machine": not arguments.alone,
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
    }
    for scheme in schemes:
        out = arguments.folder / f"{arguments.model}-small"
        record["exports"][scheme] = export(folder, scheme, out, arguments.kill_after, arguments.slice)
        found = read_json(OUT) if OUT.is_file() else {}
        write_json(OUT, found | {arguments.model: record})
    print(json.dumps(record, indent=1))
    if not arguments.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
