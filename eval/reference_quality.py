"""Measure the embedded full-precision pipelines: obedience and distance to the real digits, beside the floor.

    python eval/reference_quality.py                 # a few minutes; writes eval/results/reference_quality.json
    python eval/reference_quality.py digits-flow     # this one anew, the rows of the others stay

The rows are the shipped protocol (2,000 images) and what a plain call of the pipeline does (its own default steps
and guidance; 500 images).
"""

import argparse
import datetime
import inspect
import platform
from pathlib import Path
from typing import Any

import torch

from quantdm import load_pipeline, load_protocol
from quantdm.files import read_json, write_json
from quantdm.machine import fast_dtype, versions
from quantdm.metrics import load_extractor
from quantdm.metrics.samples import Draw, compare_real, draw_samples, real_floor
from quantdm.pipelines.known import known_pipelines

OUT = Path(__file__).parent / "results" / "reference_quality.json"
IMAGES = {"shipped protocol": 2000, "plain call": 500}
SEED = 900


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[[], *known_pipelines()])
    models = parser.parse_args().models or known_pipelines()
    known = read_json(OUT)["rows"] if OUT.is_file() else []
    rows = [row for row in known if row["model"] not in models]
    for name in models:
        rows += rows_of(name)
    rows.sort(key=lambda row: known_pipelines().index(row["model"]))
    record = {
        "seed": SEED,
        "fid_real_against": "540 real test digits",
        "floor_real_train_against_real_test": real_floor(load_protocol("digits-dit")),
        "dtype": fast_dtype(),
        "rows": rows,
        "versions": versions(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "date": datetime.date.today().isoformat(),
    }
    write_json(OUT, record)


def rows_of(name: str) -> list[dict[str, Any]]:
    """Measure one pipeline by its protocol and by a plain call."""
    shipped = load_protocol(name)
    pipe = load_pipeline(name, torch_dtype=getattr(torch, fast_dtype()))
    call = inspect.signature(pipe.__call__).parameters
    usual = {"steps": call["num_inference_steps"].default, "guidance_scale": call["guidance_scale"].default}
    plain = shipped.model_copy(update={**usual, "call": {}})
    rows = []
    for label, protocol in (("shipped protocol", shipped), ("plain call", plain)):
        samples = draw_samples(pipe, protocol, load_extractor("digits"), Draw(SEED, IMAGES[label], protocol.steps))
        rows.append(
            {
                "model": name,
                "settings": label,
                "images": IMAGES[label],
                "steps": protocol.steps,
                "guidance_scale": protocol.guidance_scale,
                **compare_real(samples, protocol),
                "seconds": round(samples.seconds, 1),
                "date": datetime.date.today().isoformat(),
            }
        )
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
