"""Does one measured option of a layer tell its others? One-layer errors told by output errors, against measured ones.

    PYTHONPATH=. python eval/told_sensitivities.py RUN_DIR           # writes eval/results/told_sensitivities_*.json

RUN_DIR is a finished run with calibrated options whose one-layer errors were all measured; its moments are read, or
gathered again. Some options of each layer are taken as measured, the others told by `completed`. The figures: the
spread of log(told / measured) and the rank correlation over all layers and options; and the sum of the measured errors
of what the knapsack chooses by the told ones, over that of its choice by all measured, at the study's sizes and between
them: what one gives away. Beside it: the output errors alone, and the weight errors.
"""

import argparse
import datetime
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantdm.activations.calibration import calibrate
from quantdm.activations.moments import JointMoments
from quantdm.allocation import select
from quantdm.allocation.pruning import dominated
from quantdm.files import write_json
from quantdm.machine import cores, versions
from quantdm.progress import bar
from quantdm.quantizers.objective import output_error
from quantdm.runs.bank import WeightBank
from quantdm.runs.run import Run
from quantdm.runs.sensitivities import completed, probed
from quantdm.runs.stages import load_space
from quantdm.schemes import ORIGINAL
from quantdm.surrogates import SearchSpace
from quantdm.surrogates.ranking import spearman

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = (2.05, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0)
COUNTS = (1, 2, 3, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    run = Run.open(parser.parse_args().run_dir)
    space = load_space(run)
    outputs = output_errors(run, space)
    measured = [dict(zip(space.labels, row, strict=True)) for row in space.noise_error.tolist()]
    tables = {f"{count} of {len(space.labels)} measured": told(measured, outputs, count) for count in COUNTS}
    tables |= {"output errors alone": outputs, "weight errors": labelled(space, space.weight_error)}
    write_json(
        RESULTS / f"told_sensitivities_{run.settings.model}.json",
        {
            "version": 1,
            "model": run.settings.model,
            "layers": len(space.layers),
            "options": len(space.labels),
            "rows": {name: judged(space, table) for name, table in tables.items()},
            "machine": f"{platform.machine()}, {cores()} cores",
            "versions": versions(),
            "date": datetime.date.today().isoformat(),
        },
    )


def output_errors(run: Run, space: SearchSpace) -> list[dict[str, float]]:
    """Return label -> relative error of the output, layer by layer."""
    subject = run.open_subject()
    bank = WeightBank.open(run.path("bank"), subject.layers, run.settings.bank_schemes)
    names = {part: [layer.name for layer in layers] for part, layers in subject.part_layers.items()}
    moments = JointMoments(calibrate(subject.pipe, run.settings.calibration, names, folder=run.path("moments")))
    found = []
    with bar(len(subject.layers), "errors of outputs") as progress:
        for layer in subject.layers:
            weight, own = subject.weights.get_parameter(f"{layer.name}.weight").detach(), moments[layer.name]
            schemes = [scheme for scheme in run.settings.schemes if scheme != ORIGINAL]
            decoded = {s.label: bank.get(layer.name, s).dequantize(dtype=torch.float32) for s in schemes}
            found.append({label: output_error(weight, each, own) for label, each in decoded.items()})
            progress.update()
    return found


def told(measured: list[dict[str, float]], outputs: list[dict[str, float]], count: int) -> list[dict[str, float]]:
    """Return what would be known of every layer had only some of its options been measured."""
    return [
        completed({label: row[label] for label in probed(own, count)}, own)
        for row, own in zip(measured, outputs, strict=True)
    ]


def labelled(space: SearchSpace, table: np.ndarray) -> list[dict[str, float]]:
    """Return a table [layers, options] by label."""
    return [dict(zip(space.labels, row, strict=True)) for row in table.tolist()]


def judged(space: SearchSpace, table: list[dict[str, float]]) -> dict[str, Any]:
    """Return how a table of errors stands to the measured one, and what a choice by it gives away."""
    known = np.array([[row.get(label, 0.0) for label in space.labels] for row in table])
    real = (known > 0) & (space.noise_error > 0)
    ratio = np.log(known[real] / space.noise_error[real])
    layer = np.nonzero(real)[0]
    within = ratio - np.array([ratio[layer == place].mean() for place in range(len(known))])[layer]
    return {
        "spearman": round(spearman(known[real], space.noise_error[real]), 4),
        "sd_of_log_within_a_layer": round(float(within.std()), 4),
        "error_over_that_of_all_measured": {f"{size:g}": round(excess(space, known, size), 3) for size in SIZES},
    }


def excess(space: SearchSpace, table: np.ndarray, size: float) -> float:
    """Return the summed measured errors of the choice by a table over those of the choice by all measured errors."""
    barred = dominated(space)
    choices = np.stack([select(space, -t, target_bits=size, forbidden=barred) for t in (table, space.noise_error)])
    own, best = space.gather(space.noise_error, choices).sum(axis=1)
    return float(own / best)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
