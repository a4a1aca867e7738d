"""A whole calibrated search of a denoiser of SDXL's size: seconds and peak memory, stage by stage.

    PYTHONPATH=. python eval/search_sdxl.py --folder DIR         # 5 GB of pipeline and 60 GB of run; hours on two cores

The weights are random, the latents 64 x 64, the protocol and the effort a toy's: what counts is that every stage runs
on a machine that can hold the model, and what it takes. The search runs in a process of its own, which is looked at
twice a second: `anonymous` is what it has allocated, `file` the pages of mapped files that happen to be in memory and
are given back where memory is short. Run it again to go on; peaks add up. Writes eval/results/search_sdxl.json.
"""

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bench_search
import bench_streaming
import psutil

from quantdm import Effort, Scheme, search
from quantdm.files import read_json, write_json
from quantdm.machine import cores, memory_gb, versions

OUT, VERSION = Path(__file__).parent / "results" / "search_sdxl.json", 1
OPTIONS = [Scheme.parse(label) for label in ("kmeans-channel-3-feedback", "uniform-channel-4", "kmeans-channel-4")]
EFFORT = Effort(
    label_images=2, label_steps=1, verify_images=2, verify_draws=1, noise_images=1, noise_steps=1, noise_signs=3,
    calibration_images=1, sweeps=0,
)  # fmt: skip
PROTOCOL = bench_search.PROTOCOL.model_copy(update={"steps": 2})
TARGET_BITS, TRIALS = 3.5, 30
# The record that a stage ends with.
STAGES = {"bank": "bank/index.json", "sensitivities": "space.json", "trials": "trials.json", "choice": "recipe.yaml"}
LOOK = 0.5  # seconds


def worked(folder: Path) -> None:
    """Search, in this process."""
    search(
        folder / "sdxl-pipeline", run_dir=folder / "run", target_bits=TARGET_BITS, trials=TRIALS, options=OPTIONS,
        protocol=PROTOCOL, effort=EFFORT, workers=1, dtype="float32",
    )  # fmt: skip


def watched(folder: Path) -> dict[str, Any]:
    """Search in a process of its own and return what every stage took; what an earlier one took counts as well."""
    record = folder / "watched.json"
    found = read_json(record, version=VERSION)["stages"] if record.is_file() else {}
    process = subprocess.Popen([sys.executable, __file__, "--folder", str(folder), "--work"], env=dict(os.environ))
    looked, last, noted = psutil.Process(process.pid), time.monotonic(), 0.0
    while process.poll() is None:
        time.sleep(LOOK)
        stage = next((name for name, file in STAGES.items() if not (folder / "run" / file).exists()), "choice")
        row = found.setdefault(stage, {"seconds": 0.0, "anonymous_gb": 0.0, "file_gb": 0.0, "resident_gb": 0.0})
        now = time.monotonic()
        row["seconds"], last = row["seconds"] + now - last, now
        try:
            memory: Any = looked.memory_info()
        except psutil.NoSuchProcess:
            continue
        sizes = {"resident_gb": memory.rss, "file_gb": memory.shared, "anonymous_gb": memory.rss - memory.shared}
        row |= {name: max(row[name], size / 1e9) for name, size in sizes.items()}
        if now - noted > 30:
            write_json(record, {"version": VERSION, "stages": found})
            noted = now
    write_json(record, {"version": VERSION, "stages": found})
    if process.returncode:
        raise SystemExit(f"the search ended with {process.returncode}; run it again to go on")
    return {name: {key: round(value, 2) for key, value in row.items()} for name, row in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the pipeline and the run are written")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    if arguments.work:
        worked(folder)
        return
    weights = bench_streaming.make("sdxl", folder / "sdxl")
    bench_search.make(folder)
    stages = watched(folder)
    model, peak = 4 * weights / 1e9, max(row["resident_gb"] for row in stages.values())
    anonymous = max(row["anonymous_gb"] for row in stages.values())
    write_json(
        OUT,
        {
            "version": VERSION,
            "options": [scheme.label for scheme in OPTIONS],
            "effort": {"trials": TRIALS, **vars(EFFORT)},
            "stages": stages,
            "model_gb": round(model, 2),
            "above_the_model_gb": {"resident": round(peak - model, 2), "anonymous": round(anonymous - model, 2)},
            "machine": f"{platform.machine()}, {cores()} cores, {memory_gb():.0f} GB",
            "other work on the machine": True,
            "versions": versions(),
            "date": datetime.date.today().isoformat(),
        },
    )


if __name__ == "__main__":
    main()
