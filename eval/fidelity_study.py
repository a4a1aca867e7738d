"""What is a cheap label worth? Rank correlations of every fidelity with the full label, and recipes learned with each.

    PYTHONPATH=. python eval/fidelity_study.py RUN_DIR --labels FILE --measure 200 # in pieces; what FILE has counts
    PYTHONPATH=. python eval/fidelity_study.py RUN_DIR --labels FILE --workers 2   # writes eval/results/fidelity_*.json

RUN_DIR is a copy of a finished run with many trials of 300 images and 8 steps. Every trial gets two further labels:
`noise`, the teacher-forced error of the denoiser's output with the whole configuration, on the calls that the
sensitivities use; and `few`, fid_fp of 64 images at half the steps. Rank correlations are taken over all trials, and
near the target (at matched size, where average bits tell nothing), beside what needs no measurement.

Then surrogates are fitted to n full labels, to m cheap ones, or to both (a straight line from cheap to full, fitted
where both are known, makes labels of one unit), and each fit chooses a recipe; three draws of the trials. The figures
are the rank correlation near the target with the full labels of trials that no fit has seen, what the labels cost, in
calls of the denoiser with one image, and fid_fp of the recipes, measured on a draw that no label saw. That is the
quality over what was spent on labels; every recipe stands before verification and tuning.
"""

import argparse
import datetime
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantdm.allocation import select
from quantdm.allocation.pruning import dominated
from quantdm.files import read_json, write_json
from quantdm.machine import cores, versions
from quantdm.metrics.samples import Draw
from quantdm.progress import bar
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import NOISE_CALLS, Evaluator, job_of
from quantdm.runs.run import Run
from quantdm.runs.stages import load_space
from quantdm.runs.store import TrialStore
from quantdm.runs.trials import label_draw, load_trials
from quantdm.surrogates import AdditiveSurrogate, SearchSpace, attribute
from quantdm.surrogates.ranking import spearman

RESULTS = Path(__file__).resolve().parent / "results"
NEAR, HELD_OUT, SEEDS = 0.4, 120, 3
FEW = 64  # images of a cheap label
SIZES = (
    (10, 0), (20, 0), (40, 0), (80, 0), (160, 0), (280, 0),
    (0, 40), (0, 80), (0, 160), (0, 280), (20, 140), (40, 120), (40, 240), (80, 200),
)  # fmt: skip  # full labels, cheap labels
FINAL = Draw(151, 1000, 20)  # on which recipes are measured
TRIALS_THEN, LABEL_THEN = 160, (300, 8)  # what a search of normal effort spent before this: labels, images, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--measure", type=int, default=0, help="label so many more trials, and stop")
    parser.add_argument("--workers", type=int, default=None)
    given = parser.parse_args()
    run = Run.open(given.run_dir)
    space = load_space(run)
    labels = read_json(given.labels) if given.labels.is_file() else {"noise": {}, "few": {}, "seconds": {}}
    if given.measure:
        measure(run, space, labels, given.labels, given.measure)
        return
    with Engine(run, run.open_subject(), workers=given.workers) as engine:
        write_json(RESULTS / f"fidelity_{run.settings.model}.json", study(run, engine, space, labels))


def measure(run: Run, space: SearchSpace, labels: dict, path: Path, most: int) -> None:
    evaluator = Evaluator(run, run.open_subject())
    full = label_draw(run)
    few = few_of(full)
    evaluator.reference(few)
    evaluator.recorded_calls()  # what all of them share is not theirs to pay
    took: dict[str, list[float]] = {"noise": [], "few": []}
    choices, _ = load_trials(run, space)
    for choice in choices:
        config = space.config(choice).to_labels()
        key = job_of(run, full, config).key
        if key in labels["few"] or len(took["few"]) >= most:
            continue
        start = time.perf_counter()
        labels["noise"][key] = evaluator.noise_error(job_of(run, full, config))["noise_error"]
        middle = time.perf_counter()
        labels["few"][key] = evaluator.measure(job_of(run, few, config))["fid_fp"]
        took["noise"].append(middle - start)
        took["few"].append(time.perf_counter() - middle)
    labels["seconds"] = {kind: float(np.median(times)) for kind, times in took.items() if times} or labels["seconds"]
    write_json(path, labels)
    print(len(labels["few"]), labels["seconds"], flush=True)


def few_of(full: Draw) -> Draw:
    """Return what a cheap label is measured on."""
    return Draw(full.base_seed, FEW, max(full.steps // 2, 1))


def study(run: Run, engine: Engine, space: SearchSpace, labels: dict[str, Any]) -> dict[str, Any]:
    """Return rank correlations of labels, and what recipes learned with them are worth."""
    fits_of = labelled(run, space, labels)
    choices, y, cheap, near, target = fits_of.choices, fits_of.y, fits_of.cheap, fits_of.near, fits_of.target
    bits = space.avg_bits(choices)
    free = {"average bits": bits, "sum of one-layer errors": -space.gather(space.noise_error, choices).sum(axis=1)}
    ranks = {
        name: {"all": round(spearman(x, y), 3), "near": round(spearman(x[near], y[near]), 3)}
        for name, x in {**free, **cheap}.items()
    }
    fits = [fit for size in SIZES for fit in fits_of.of(*size)]
    plain = select(space, -space.noise_error, target_bits=target, forbidden=dominated(space))
    fid = measured(run, engine, space, [plain, *(choice for fit in fits for choice in fit["choices"])])
    return {
        "version": 2,
        "model": run.settings.model,
        "trials": len(y),
        "near": int(near.sum()),
        "calls_per_label": costs(run),
        "rank_correlation": ranks,
        "one-layer errors, no label": fid[plain.tobytes()],
        "recipes": [told(fit, fid, costs(run)) for fit in fits],
        "final": f"{FINAL.images} images, {FINAL.steps} steps, draw {FINAL.base_seed}",
        "machine": f"{platform.machine()}, {cores()} cores",
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }


def labelled(run: Run, space: SearchSpace, labels: dict[str, Any]) -> "Fits":
    """Return the trials that have all labels, to be fitted."""
    choices, y = load_trials(run, space)
    keys = [job_of(run, label_draw(run), space.config(choice).to_labels()).key for choice in choices]
    both = [place for place, key in enumerate(keys) if key in labels["few"]]
    choices, y, keys = choices[both], y[both], [keys[place] for place in both]
    cheap = {kind: -np.log([max(labels[kind][key], 1e-9) for key in keys]) for kind in ("noise", "few")}
    target = run.settings.target_bits
    return Fits(space, choices, y, cheap, np.abs(space.avg_bits(choices) - target) <= NEAR, target)


def costs(run: Run) -> dict[str, int]:
    """Return the calls of the denoiser with one image (guidance counts as one) that a label of each kind takes."""
    full = label_draw(run)
    few = few_of(full)
    return {
        "full": full.images * full.steps,
        "few": few.images * few.steps,
        "noise": run.settings.noise_images * NOISE_CALLS,
        "final": FINAL.images * FINAL.steps,
    }


@dataclass(frozen=True)
class Fits:
    """Fits to labels of trials, and what they choose."""

    space: SearchSpace
    choices: np.ndarray
    y: np.ndarray
    cheap: dict[str, np.ndarray]
    near: np.ndarray
    target: float

    def of(self, full: int, more: int) -> Iterator[dict[str, Any]]:
        """Yield what fits to `full` full labels and `more` cheap ones choose, per kind of cheap label."""
        for kind in self.cheap if more else (None,):
            found: dict[str, Any] = {"full": full, "cheap": more, "kind": kind, "choices": [], "ranks": []}
            for seed in range(SEEDS):
                order = np.random.default_rng(seed).permutation(len(self.y))
                held, rest = order[:HELD_OUT], order[HELD_OUT:]
                judged = held[self.near[held]]
                fitted = self._fitted(rest[:full], rest[full : full + more], kind, seed)
                values = attribute(fitted).values
                barred = dominated(self.space)
                found["choices"].append(select(self.space, values, target_bits=self.target, forbidden=barred))
                found["ranks"].append(spearman(fitted.predict(self.choices[judged]), self.y[judged]))
            yield found

    def _fitted(self, own: np.ndarray, others: np.ndarray, kind: str | None, seed: int) -> AdditiveSurrogate:
        values = self.y[own]
        if kind is not None:
            cheap = self.cheap[kind]
            line = np.polyfit(cheap[own], self.y[own], 1) if len(own) else (1.0, 0.0)
            values = np.concatenate([values, np.polyval(line, cheap[others])])
        return AdditiveSurrogate(self.space, random_state=seed).fit(self.choices[np.concatenate([own, others])], values)


def measured(run: Run, engine: Engine, space: SearchSpace, choices: list[np.ndarray]) -> dict[bytes, float]:
    """Return fid_fp of every choice on the final draw, measured once each and kept in the run directory."""
    distinct = {choice.tobytes(): choice for choice in choices}
    jobs = {key: job_of(run, FINAL, space.config(choice).to_labels()) for key, choice in distinct.items()}
    store = TrialStore(run.path("fidelity"))
    missing = [job for job in jobs.values() if store.get(job.key) is None]
    list(engine.map("prepare", [FINAL]))
    with bar(len(missing), "recipes") as progress:
        for place, figures in engine.map("measure", missing):
            store.put(missing[place].key, figures)
            progress.update()
    return {key: read_json(store.path(job.key))["fid_fp"] for key, job in jobs.items()}


def told(fit: dict[str, Any], fid: dict[bytes, float], cost: dict[str, int]) -> dict[str, Any]:
    """Return a fit's figures with mean and deviation over its draws of trials."""
    quality = [fid[choice.tobytes()] for choice in fit["choices"]]
    spent = fit["full"] * cost["full"] + fit["cheap"] * cost.get(fit["kind"] or "", 0)
    return {
        **{key: fit[key] for key in ("full", "cheap", "kind")},
        "calls": spent,
        "of a normal search": round(spent / (TRIALS_THEN * LABEL_THEN[0] * LABEL_THEN[1]), 4),
        "rank": round(float(np.mean(fit["ranks"])), 3),
        "rank_sd": round(float(np.std(fit["ranks"], ddof=1)), 3),
        "fid_fp": round(float(np.mean(quality)), 5),
        "fid_fp_sd": round(float(np.std(quality, ddof=1)), 5),
        "each": [round(q, 5) for q in quality],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
