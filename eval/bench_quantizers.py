"""The quantizers beside their peers, side by side in one run; writes eval/results/bench_quantizers.json.

    python -m venv .peers
    .peers/bin/pip install torch==2.13.0 diffusers transformers accelerate scikit-learn numba \\
        flash1dkmeans bitsandbytes sdnq hqq torchao optimum-quanto
    python eval/bench_quantizers.py --peers .peers/bin/python             # all parts
    python eval/bench_quantizers.py --peers .peers/bin/python --parts rows models

rows: per-channel k-means against the exact optimum, scikit-learn and flash1dkmeans. models: output SQNR of whole
denoisers at equal bytes. images: fid_fp of 2 and 3 bits, plain, with error feedback, refined and tuned. Times are CPU
seconds of one thread. What is run again replaces its figures in the record.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_images import measure_images
from bench_models import compare_models
from bench_rows import compare_rows

from quantdm.files import read_json, write_json
from quantdm.machine import cores, versions
from quantdm.pipelines.known import known_pipelines

OUT = Path(__file__).parent / "results" / "bench_quantizers.json"
VERSION = 1
PEER_PACKAGES = ("bitsandbytes", "sdnq", "hqq", "torchao", "optimum-quanto", "scikit-learn", "flash1dkmeans", "torch")


def peer_versions(python: Path) -> dict[str, str]:
    """Return the versions of the peers in their environment, those that are there."""
    code = (
        "import importlib.metadata as m, json; "
        "print(json.dumps({d.metadata['Name']: d.version for d in m.distributions()}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return {package: found[package] for package in PEER_PACKAGES if package in found}


MODELS = (*known_pipelines(), "random-dit")
PARTS: dict[str, Callable[[Any, Path, Sequence[str]], dict[str, Any]]] = {
    "rows": compare_rows,
    "models": compare_models,
    "images": measure_images,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="the python of the peers' environment (images need none)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="which denoisers")
    arguments = parser.parse_args()
    if arguments.peers is None and set(arguments.parts) != {"images"}:
        parser.error("--peers: needed for all parts but images")
    torch.set_num_threads(1)
    record: dict[str, Any] = {"version": VERSION, "parts": {}}
    if OUT.is_file():
        record = read_json(OUT, version=VERSION)
    for part in arguments.parts:
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory(prefix="bench_quantizers.") as folder:
            figures = PARTS[part](arguments.peers, Path(folder), arguments.models)
        record["parts"][part] = {
            **record["parts"].get(part, {}),
            **figures,
            "date": datetime.date.today().isoformat(),
            "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
        }
        record |= {
            "machine": f"{platform.machine()}, {cores()} cores",
            "versions": versions(),
        }
        if arguments.peers is not None:
            record["peers"] = peer_versions(arguments.peers)
        write_json(OUT, record)


if __name__ == "__main__":
    main()
