"""On what draws do good candidates come apart? Regret of choosing the best of eight by cheaper measurements.

    PYTHONPATH=. python eval/verification_study.py RUN_DIR --labels FILE   # resumable; eval/results/verification_*.json

RUN_DIR and FILE are those of `fidelity_study.py`, whose recipes were measured on a draw of 1,000 images and 20 steps,
the truth here. The MOST best of them are measured on other noises: as many steps as the protocol has, or fewer. The
figures are the rank correlation with the truth, and the mean share by which the truth of the choice among eight random
ones lies above that of the best of the eight; a choice at random says what there is to lose.
"""

import argparse
import datetime
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.fidelity_study import FINAL, SIZES, labelled
from quantdm.files import read_json, write_json
from quantdm.machine import versions
from quantdm.metrics import frechet_distance
from quantdm.metrics.samples import Draw
from quantdm.progress import bar
from quantdm.runs.evaluator import Evaluator, Job, job_of
from quantdm.runs.run import Run
from quantdm.runs.stages import load_space
from quantdm.runs.store import TrialStore
from quantdm.surrogates import SearchSpace
from quantdm.surrogates.ranking import spearman

RESULTS = Path(__file__).resolve().parent / "results"
MOST, GROUP, GROUPS = 40, 8, 4000
# What is generated, and of how many of its images a distance is taken
DRAWS = {
    Draw(171, 150, 20): (50, 100, 150), Draw(172, 300, 8): (150, 300), Draw(173, 600, 4): (75, 150, 300, 600),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--labels", type=Path, required=True)
    given = parser.parse_args()
    run = Run.open(given.run_dir)
    space = load_space(run)
    truth, jobs = best_recipes(run, space, read_json(given.labels))
    kinds: dict[str, list[float]] = {}
    for draw, sizes in DRAWS.items():
        kinds |= measured(run, jobs, draw, sizes)
    result = {
        "version": 1,
        "model": run.settings.model,
        "recipes": len(jobs),
        "truth": f"{FINAL.images} images, {FINAL.steps} steps: fid_fp {min(truth):.4f} to {max(truth):.4f}",
        "at random": regret(truth, np.random.default_rng(1).normal(size=(GROUPS, len(truth)))),
        "draws": {kind: judged(kind, truth, np.array(values)) for kind, values in kinds.items()},
        "machine": f"{platform.machine()}, {run.settings.dtype}",
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }
    write_json(RESULTS / f"verification_{run.settings.model}.json", result)


def best_recipes(run: Run, space: SearchSpace, labels: dict[str, Any]) -> tuple[np.ndarray, list[Job]]:
    """Return fid_fp on the draw of the truth, and the configurations, of the recipes of the study of labels."""
    fits = labelled(run, space, labels)
    chosen = {c.tobytes(): c for size in SIZES for fit in fits.of(*size) for c in fit["choices"]}
    store, known = TrialStore(run.path("fidelity")), []
    for choice in chosen.values():
        job = job_of(run, FINAL, space.config(choice).to_labels())
        if (record := store.get(job.key)) is not None:
            known.append((record["fid_fp"], job))
    known.sort(key=lambda item: item[0])
    print(f"{len(known)} of {len(chosen)} recipes were measured; the {MOST} best are looked at")
    return np.array([fid for fid, _ in known[:MOST]]), [job for _, job in known[:MOST]]


def measured(run: Run, jobs: list[Job], draw: Draw, sizes: tuple[int, ...]) -> dict[str, list[float]]:
    """Return fid_fp of every configuration on the first images of a draw, by what was drawn; kept in the run."""
    path = run.path(f"verification-{draw.base_seed}.json")
    kept = read_json(path) if path.is_file() else {}
    evaluator: Evaluator | None = None
    with bar(len(jobs), f"{draw.images} images x {draw.steps} steps") as progress:
        for job in jobs:
            if job.key not in kept:
                evaluator = evaluator or Evaluator(run, run.open_subject())
                own = evaluator.samples(Job(draw, job.labels, embeddings=job.embeddings)).features
                reference = evaluator.reference(draw).features
                kept[job.key] = {str(n): frechet_distance(own[:n], reference[:n]) for n in sizes}
                write_json(path, kept)
            progress.update()
    return {f"{n} x {draw.steps}": [kept[job.key][str(n)] for job in jobs] for n in sizes}


def judged(kind: str, truth: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """Return what a kind of draw costs, in calls of the denoiser with one image, and how it chooses."""
    images, steps = map(int, kind.split(" x "))
    return {"calls": images * steps, "spearman": round(spearman(values, truth), 3), "regret": regret(truth, values)}


def regret(truth: np.ndarray, values: np.ndarray) -> float:
    """Return the mean share by which the choice among some random ones lies above the best of them."""
    chance, found = np.random.default_rng(0), []
    for i in range(GROUPS):
        group = chance.choice(len(truth), GROUP, replace=False)
        row = values[i] if values.ndim == 2 else values
        found.append(truth[group[np.argmin(row[group])]] / truth[group].min() - 1)
    return round(float(np.mean(found)), 4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
