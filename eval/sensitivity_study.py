"""One-layer errors from backward passes, against measured ones: how many random signs does a search need?

    PYTHONPATH=. python eval/sensitivity_study.py RUN_DIR           # writes eval/results/sensitivity_*.json

RUN_DIR is a finished run whose one-layer errors were all measured (`Effort(noise_signs=None)`, or begun before 0.3).
The figures: the spread of log(estimated / measured) and the rank correlation over all layers and options; the sum of
the measured errors of what the knapsack chooses by the estimates, over that of its choice by the measured ones, at the
study's sizes and between them: what one gives away; and how both rank the run's trials by their sums. Beside it what a
pass takes and what measuring took, in seconds of the processor.
"""

import argparse
import datetime
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from quantdm.allocation import select
from quantdm.allocation.pruning import dominated
from quantdm.errors import QuantDMError
from quantdm.files import write_json
from quantdm.machine import cores, one_torch_thread, versions
from quantdm.progress import bar
from quantdm.runs.evaluator import Evaluator, Probe
from quantdm.runs.propagated import Pass
from quantdm.runs.run import Run
from quantdm.runs.stages import load_space
from quantdm.runs.trials import load_trials
from quantdm.schemes import ORIGINAL
from quantdm.surrogates import SearchSpace
from quantdm.surrogates.ranking import spearman

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = (2.05, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0)
PASSES = (1, 4, 16)
TIMED = 4  # layers that are measured once more, for the time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    run = Run.open(parser.parse_args().run_dir)
    if run.settings.noise_signs is not None:
        raise QuantDMError(f"{run.folder}: its one-layer errors are estimates, expected a run that measured them")
    space, evaluator = load_space(run), Evaluator(run, run.open_subject())
    options = tuple(label for label in space.labels if label != ORIGINAL.label)
    evaluator.recorded_calls()
    began, found = time.process_time(), []
    with bar(max(PASSES), "backward passes") as progress:
        for seed in range(max(PASSES)):
            found.append(evaluator.propagate(Pass(seed, options)))
            progress.update()
    each = (time.process_time() - began) / len(found)
    tables = {count: np.mean([table_of(space, one["errors"]) for one in found[:count]], axis=0) for count in PASSES}
    rows = {str(count * found[0]["draws"]): judged(run, space, table) for count, table in tables.items()}
    write_json(
        RESULTS / f"sensitivity_{run.settings.model}.json",
        {
            "version": 1,
            "model": run.settings.model,
            "layers": len(space.layers),
            "options": len(options),
            "rows by signs": rows,
            "rank of trials by measured sums": ranks(run, space, space.noise_error),
            "cpu_seconds": {"a pass": round(each, 2), "all measured": round(measuring(evaluator, space, options), 1)},
            "signs of a pass": found[0]["draws"],
            "machine": f"{platform.machine()}, {cores()} cores",
            "versions": versions(),
            "date": datetime.date.today().isoformat(),
        },
    )


def table_of(space: SearchSpace, errors: dict[str, dict[str, float]]) -> np.ndarray:
    """Return estimates as a table [layers, options]."""
    return np.array([[errors[name].get(label, 0.0) for label in space.labels] for name in space.layer_names])


def measuring(evaluator: Evaluator, space: SearchSpace, options: tuple[str, ...]) -> float:
    """Return the seconds of the processor that measuring all layers takes, from some of them."""
    began = time.process_time()
    for name in space.layer_names[:: len(space.layers) // TIMED][:TIMED]:
        evaluator.sensitivity(Probe(name, options))
    return (time.process_time() - began) * len(space.layers) / TIMED


def judged(run: Run, space: SearchSpace, table: np.ndarray) -> dict[str, Any]:
    """Return how a table of errors stands to the measured one, and what a choice by it gives away."""
    real = (table > 0) & (space.noise_error > 0)
    ratio = np.log(table[real] / space.noise_error[real])
    return {
        "spearman": round(spearman(table[real], space.noise_error[real]), 4),
        "sd_of_log": round(float(ratio.std()), 4),
        "mean_of_log": round(float(ratio.mean()), 4),
        "error_over_that_of_all_measured": {f"{size:g}": round(excess(space, table, size), 3) for size in SIZES},
        "rank of trials by sums": ranks(run, space, table),
    }


def ranks(run: Run, space: SearchSpace, table: np.ndarray) -> dict[str, float]:
    """Return the rank correlation of minus the sums with the labels of all trials, and of those near three bits."""
    choices, y = load_trials(run, space)
    near = np.abs(space.avg_bits(choices) - 3.0) <= 0.25
    sums = -space.gather(table, choices).sum(axis=1)
    return {"all": round(spearman(sums, y), 4), "near 3 bits": round(spearman(sums[near], y[near]), 4)}


def excess(space: SearchSpace, table: np.ndarray, size: float) -> float:
    """Return the summed measured errors of the choice by a table over those of the choice by all measured errors."""
    barred = dominated(space)
    choices = np.stack([select(space, -t, target_bits=size, forbidden=barred) for t in (table, space.noise_error)])
    own, best = space.gather(space.noise_error, choices).sum(axis=1)
    return float(own / best)


if __name__ == "__main__":
    with one_torch_thread():
        main()
