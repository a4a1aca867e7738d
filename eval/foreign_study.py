"""The corridor on the network that nobody here trained: a recipe of 3 bits against single schemes of no fewer bytes.

    python eval/foreign_study.py foreign -o runs/foreign      # after eval/foreign.py; run it again to go on

A small search (labels by pyramid features: they need no weights and no second network), then the rows on equal seeds by
FD-EfficientNet-Lite0 (the extra `features`), pyramid features and PSNR. Says whether the recipe beats the best single
scheme of 3 bits at no fewer bytes by each ruler, with intervals. Writes eval/results/foreign.json.
"""

import argparse
import datetime
import platform
from pathlib import Path
from typing import Any

import torch
from rulers import Rulers, difference

from quantdm import Scheme, load_protocol
from quantdm.files import read_json, write_json
from quantdm.hub.size import ExportSize
from quantdm.machine import cores, versions
from quantdm.metrics.samples import Draw
from quantdm.metrics.statistics import mean_and_sd
from quantdm.pipelines.subject import look_at
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import Job
from quantdm.runs.final import row_bits, space_config, with_tables
from quantdm.runs.search import find_recipe, start_run
from quantdm.runs.settings import Effort
from quantdm.runs.stages import load_space
from quantdm.schemes import TABLE_SCHEME
from quantdm.surrogates import SearchSpace

HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "foreign.json"
BITS, TRIALS = 3.0, 30
OPTIONS = tuple(
    Scheme.parse(f"{label}-feedback")
    for label in ("kmeans-shared-2", "kmeans-shared-3", "kmeans-channel-3", "kmeans-shared-4", "uniform-channel-6")
)
EFFORT = Effort(
    label_images=8, label_steps=1, verify_images=12, noise_images=1, calibration_images=8, sweeps=1, verify_draws=2
)
RIVALS = ("kmeans-shared-3-feedback", "kmeans-channel-3-feedback", "kmeans-shared-4-feedback")
IMAGES, DRAWS = 20, (901, 902, 903)
RULERS = ("pyramid", "efficientnet-lite0")
LOWER = tuple(f"fd:{name}" for name in RULERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    run, subject = start_run(
        look_at(arguments.pipeline), arguments.out / "search", target_bits=BITS, trials=TRIALS, options=OPTIONS,
        protocol=load_protocol(HERE / "foreign.yaml"), effort=EFFORT,
    )  # fmt: skip
    with Engine(run, subject, workers=1) as engine:
        find_recipe(run, engine, subject)
        selection, space = read_json(run.path("selection.json"), version=1), load_space(run)
        jobs = jobs_of(selection, space, run.settings.embeddings)
        draws = [Draw(seed, IMAGES, run.settings.protocol.steps) for seed in DRAWS]
        found = Rulers(engine.local, RULERS, arguments.out / "rows").measure(jobs, draws, "final: rows x draws")
    record = {
        "version": 1,
        "protocol": f"{len(DRAWS)} draws of {IMAGES} images, one step, to full precision on equal noises",
        "search": {
            "bits": BITS, "trials": TRIALS, "options": run.settings.options, "chosen": selection["chosen"],
            **vars(EFFORT),
        },
        "rows": rows_of(found, jobs, space, ExportSize(subject.pipe, embeddings=TABLE_SCHEME)),
        "versions": versions(),
        "machine": f"{platform.machine()}, {cores()} cores, {run.settings.dtype}",
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    record["differences_of_recipe"] = {
        name: {key: vars(difference(found["recipe"], rows, key)) for key in LOWER}
        for name, rows in found.items()
        if name != "recipe"
    }
    record["beats_best_3_bit_scheme_of_no_fewer_bytes"] = verdict(record["rows"])
    write_json(OUT, record)
    for name, row in record["rows"].items():
        print(name, {k: round(v, 4) for k, v in row["mean"].items() if v is not None}, round(row["bits"], 3))
    print(record["beats_best_3_bit_scheme_of_no_fewer_bytes"])


def jobs_of(selection: dict[str, Any], space: SearchSpace, embeddings: str | None) -> dict[str, Job]:
    """Return what is measured by name: the recipe, what sensitivities alone choose, single schemes everywhere."""
    draw, configs = Draw(0, 0, 0), selection["configs"]
    rows = {"recipe": Job(draw, configs[selection["chosen"]])}
    rows["one-layer sensitivities (knapsack)"] = Job(draw, configs["sensitivity"])
    rows |= {label: Job(draw, space_config(space, Scheme.parse(label))) for label in RIVALS}
    return {name: job for name, (job, _) in with_tables({k: (v, "") for k, v in rows.items()}, embeddings).items()}


def rows_of(
    found: dict[str, list[dict[str, Any]]], jobs: dict[str, Job], space: SearchSpace, size: ExportSize
) -> dict[str, Any]:
    """Return per row bits, bytes of the denoiser on disk, and figures with their spread over draws."""
    weights = int(space.num_weights.sum())
    return {
        name: {
            "bits": row_bits(space, jobs[name]) / weights,
            "denoiser_bytes": size.of(jobs[name].labels),
            **mean_and_sd([each["figures"] for each in figures]),
        }
        for name, figures in found.items()
    }


def verdict(rows: dict[str, Any]) -> dict[str, Any]:
    """Return, per ruler, the best 3-bit scheme that has no fewer bytes, and whether the recipe beats it."""
    recipe = rows["recipe"]
    rivals = [n for n in RIVALS if "-3" in n and rows[n]["denoiser_bytes"] >= recipe["denoiser_bytes"]]
    found = {}
    for key in (*LOWER, "psnr"):
        sign = -1 if key == "psnr" else 1
        best = min(rivals, key=lambda name: sign * rows[name]["mean"][key])
        found[key] = {
            "rival": best,
            "beaten": sign * recipe["mean"][key] < sign * rows[best]["mean"][key],
            "recipe": recipe["mean"][key],
            "value": rows[best]["mean"][key],
        }
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
