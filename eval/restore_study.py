"""Do explanations say what really happens? Restore layers, swap layers, degrade whole blocks, and measure.

    PYTHONPATH=. python eval/restore_study.py RUN_DIR [--workers 1] [--only curves swaps blocks] [--dry-run]

Curves: all layers at the narrowest option against two bits more of the same method. Layers are restored in the order of
predicted gain per byte until a share of the bytes is spent: how much of the loss is undone, on the same draws, by
surrogates, one-layer noise errors, weight errors, bits (smallest layers first) and chance? Differences of areas come
with paired intervals over the images.

Swaps: in the 3.0-bit choice of the one-layer sensitivities (which no surrogate chose) one layer takes another option;
predicted differences are held against measured ones on two draws of noises. The agreement r of the draws bounds what
can be reached: rho over that ceiling is reported too, and the swaps beyond two standard deviations of a label apart
from the rest.

Blocks: all layers at the second narrowest width of one method; the layers of a block lose a bit one at a time and all
together. The interaction is what the block loses beyond its layers: predicted against measured.

Every measurement lasts some seconds, is kept in the run directory (verified/), and is not made again: stop it when you
like, and run it again to go on. `--dry-run` says how long it takes, `--limit` measures that many configurations.
Writes eval/results/restore_MODEL.json, study after study.
"""

import argparse
import datetime
import math
import platform
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.restore_truth import judge_blocks, judge_curves, judge_swaps, plan_blocks, plan_curves, plan_swaps
from quantdm.files import read_json, write_json
from quantdm.machine import cores, versions
from quantdm.metrics.samples import Draw
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import job_of
from quantdm.runs.explain import SURROGATES, weights_near
from quantdm.runs.run import Run
from quantdm.runs.stages import load_space
from quantdm.runs.store import TrialStore
from quantdm.runs.trials import label_of, load_trials
from quantdm.runs.verify import INFLUENCE, verify
from quantdm.surrogates import SearchSpace

ROOT = Path(__file__).resolve().parents[1]
STUDIES = {
    "curves": (plan_curves, judge_curves),
    "swaps": (plan_swaps, judge_swaps),
    "blocks": (plan_blocks, judge_blocks),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--only", nargs="*", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--images", type=int, default=None, help="per draw (default: as many as a trial has)")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    run = Run.open(arguments.run_dir)
    space = load_space(run)
    choices, y = load_trials(run, space)
    weights = weights_near(space, choices, run.settings.target_bits)  # as the run fits
    fitted = {
        name: kind(space, random_state=run.settings.seed).fit(choices, y, weights) for name, kind in SURROGATES.items()
    }
    path = ROOT / "eval" / "results" / f"restore_{run.settings.model}.json"
    record: dict[str, Any] = read_json(path, version=1) if path.exists() else {"version": 1}
    record |= {"trials": len(y), "machine": platform.machine(), "versions": versions()}
    plans = {name: STUDIES[name][0](space, fitted, arguments.swaps) for name in arguments.only}
    at, left = Measurements(run, space, arguments.images), arguments.limit
    for name, plan in plans.items():
        at.say_time(name, plan["rows"], arguments.workers or cores())
    if arguments.dry_run:
        return
    with Engine(run, run.open_subject(), workers=arguments.workers) as engine:
        for name, plan in plans.items():
            missing = at.lacking(plan["rows"])
            some = missing[:left]
            at.make(engine, some, name)
            if len(some) < len(missing):
                print(f"{name}: {len(missing) - len(some)} configurations are left")
                return
            left = None if left is None else left - len(some)
            record[name] = STUDIES[name][1](space, fitted, plan, *at.found(plan["rows"]))
            record[name]["date"] = datetime.date.today().isoformat()
            write_json(path, record)
            print(name, record[name], flush=True)


class Measurements:
    """Choices on two draws that no trial and no verification used, kept with the run."""

    def __init__(self, run: Run, space: SearchSpace, images: int | None) -> None:
        count, steps = images or run.settings.label_images, run.settings.label_steps
        self.run, self.space = run, space
        self.draws = [Draw(run.settings.seed * 1000 + 501 + i, count, steps) for i in range(2)]
        self.store = TrialStore(run.path("verified"))

    def of(self, draw: Draw, choice: np.ndarray) -> dict[str, Any] | None:
        """Return the measurement of a choice [L] on a draw, if there is one."""
        return self.store.get(job_of(self.run, draw, self.space.config(choice).to_labels()).key)

    def lacking(self, rows: np.ndarray) -> np.ndarray:
        """Return the distinct choices [N, L] that are not measured on both draws yet, in order."""
        rows = rows[np.sort(np.unique(rows, axis=0, return_index=True)[1])]
        return rows[[any(self.of(draw, row) is None for draw in self.draws) for row in rows]]

    def say_time(self, name: str, rows: np.ndarray, workers: int) -> None:
        """Print how many measurements a study lacks, and about how long they take at the pace of the trials."""
        settings, count = self.run.settings, 2 * len(self.lacking(rows))
        pace = statistics.median(trial["seconds"] for trial in TrialStore(self.run.path("trials")))
        minutes = count * pace * self.draws[0].images / settings.label_images / workers / 60
        print(f"{name}: {count} measurements to make, about {math.ceil(minutes)} min", flush=True)

    def make(self, engine: Engine, rows: np.ndarray, what: str) -> None:
        """Measure choices [N, L] on both draws."""
        configs = {str(index): self.space.config(row).to_labels() for index, row in enumerate(rows)}
        verify(self.run, engine, configs, self.draws, what)

    def found(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return y of choices [N, L] on both draws, [2, N], and what every image adds to it, [2, N, images]."""
        y, influence = [], []
        for draw in self.draws:
            records = [record for row in rows if (record := self.of(draw, row)) is not None]
            y.append([label_of(record) for record in records])
            influence.append([-np.array(record[INFLUENCE]) / record["fid_fp"] for record in records])
        return np.array(y), np.array(influence)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
