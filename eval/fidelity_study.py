"""What is a cheap label worth? Rank correlations of every fidelity with the full label, and recipes learned with each.

    PYTHONPATH=. python eval/fidelity_study.py RUN_DIR --labels FILE --measure 200 # in pieces; what FILE has counts
    PYTHONPATH=. python eval/fidelity_study.py RUN_DIR --labels FILE               # writes eval/results/fidelity_*.json

RUN_DIR is a copy of a finished run with many trials. Every trial gets two further labels: `noise`, the teacher-forced
error of the denoiser's output with the whole configuration, on the calls that the sensitivities use; and `few`, fid_fp
of 64 images at half the steps. Rank correlations are taken over all trials, and near the target (at matched size, where
average bits tell nothing), beside what needs no measurement.

Then surrogates are fitted to n full labels, and to n full labels with cheap ones of other trials: a straight line from
cheap to full, fitted where both are known, makes labels of one unit. The figures are the rank correlation near the
target with the full labels of trials that no fit has seen, and the label that a surrogate of all full labels predicts
for the recipe that each fit chooses: three draws of the trials.
"""

import argparse
import datetime
import json
import platform
import time
from pathlib import Path

import numpy as np

from quantdm.allocation import select
from quantdm.allocation.pruning import dominated
from quantdm.files import read_json, write_json
from quantdm.machine import versions
from quantdm.metrics.samples import Draw
from quantdm.runs.evaluator import Evaluator, job_of
from quantdm.runs.run import Run
from quantdm.runs.stages import load_space
from quantdm.runs.trials import label_draw, load_trials
from quantdm.surrogates import AdditiveSurrogate, SearchSpace, attribute
from quantdm.surrogates.ranking import spearman

RESULTS = Path(__file__).resolve().parent / "results"
NEAR, HELD_OUT, SEEDS = 0.4, 120, 3
SIZES = ((40, 0), (40, 120), (40, 240), (80, 0), (80, 200), (160, 0), (280, 0))  # full labels, cheap labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--measure", type=int, default=0, help="label so many more trials, and stop")
    given = parser.parse_args()
    run = Run.open(given.run_dir)
    space = load_space(run)
    labels = read_json(given.labels) if given.labels.is_file() else {"noise": {}, "few": {}, "seconds": {}}
    if given.measure:
        measure(run, space, labels, given.labels, given.measure)
        return
    write_json(RESULTS / f"fidelity_{run.settings.model}.json", study(run, space, labels))


def measure(run: Run, space: SearchSpace, labels: dict, path: Path, most: int) -> None:
    evaluator = Evaluator(run, run.open_subject())
    full = label_draw(run)
    few = Draw(full.base_seed, 64, max(full.steps // 2, 1))
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


def study(run: Run, space: SearchSpace, labels: dict) -> dict:
    choices, y = load_trials(run, space)
    keys = [job_of(run, label_draw(run), space.config(choice).to_labels()).key for choice in choices]
    both = [place for place, key in enumerate(keys) if key in labels["few"]]
    choices, y, keys = choices[both], y[both], [keys[place] for place in both]
    cheap = {kind: -np.log([max(labels[kind][key], 1e-9) for key in keys]) for kind in ("noise", "few")}
    bits, target = space.avg_bits(choices), run.settings.target_bits
    near = np.abs(bits - target) <= NEAR
    free = {"average bits": bits, "sum of one-layer errors": -space.gather(space.noise_error, choices).sum(axis=1)}
    ranks = {
        name: {"all": round(spearman(x, y), 3), "near": round(spearman(x[near], y[near]), 3)}
        for name, x in {**free, **cheap}.items()
    }
    judge = AdditiveSurrogate(space).fit(choices, y)
    trials = [read_json(path) for path in sorted(run.path("trials").glob("*.json"))]
    seconds = {**labels["seconds"], "full": float(np.median([trial["seconds"] for trial in trials]))}
    return {
        "version": 1,
        "model": run.settings.model,
        "trials": len(y),
        "near": int(near.sum()),
        "seconds": seconds,
        "rank_correlation": ranks,
        "recipes": [recipes(space, choices, y, cheap, near, judge, target, *size) for size in SIZES],
        "machine": platform.processor(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }


def recipes(
    space: SearchSpace,
    choices: np.ndarray,
    y: np.ndarray,
    cheap: dict[str, np.ndarray],
    near: np.ndarray,
    judge: AdditiveSurrogate,
    target: float,
    full: int,
    more: int,
) -> dict:
    """Return what fits to `full` labels and `more` cheap ones are worth, per kind of cheap label."""
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(SEEDS):
        order = np.random.default_rng(seed).permutation(len(y))
        held, rest = order[:HELD_OUT], order[HELD_OUT:]
        judged = held[near[held]]
        own, others = rest[:full], rest[full : full + more]
        for kind in cheap if more else ("none",):
            rows, values = own, y[own]
            if more:
                line = np.polyfit(cheap[kind][own], y[own], 1)
                rows, values = (
                    np.concatenate([own, others]),
                    np.concatenate([values, np.polyval(line, cheap[kind][others])]),
                )
            fitted = AdditiveSurrogate(space, random_state=seed).fit(choices[rows], values)
            choice = select(space, attribute(fitted).values, target_bits=target, forbidden=dominated(space))
            rank = spearman(fitted.predict(choices[judged]), y[judged])
            found.setdefault(kind, []).append((float(rank), float(judge.predict(choice[None])[0])))
    print(full, more, json.dumps(found), flush=True)
    return {"full": full, "cheap": more, **{kind: summary(rows) for kind, rows in found.items()}}


def summary(rows: list[tuple[float, float]]) -> dict[str, float]:
    ranks, labels = np.array(rows).T
    return {
        "rank": round(float(ranks.mean()), 3),
        "rank_sd": round(float(ranks.std(ddof=1)), 3),
        "predicted_fid_fp": round(float(np.exp(-labels).mean()), 5),
        "predicted_fid_fp_sd": round(float(np.exp(-labels).std(ddof=1)), 5),
    }


if __name__ == "__main__":
    main()
