"""What a label is: of which images, under which key, in which unit; and how many time allows."""

from collections.abc import Callable
from typing import Any

import numpy as np

from quantdm.metrics.samples import Draw
from quantdm.runs.evaluator import job_of
from quantdm.runs.run import MIN_TRIALS, Run
from quantdm.surrogates import SearchSpace


def label_draw(run: Run) -> Draw:
    """Return the noises of the search's labels."""
    return Draw(run.settings.seed * 1000, run.settings.label_images, run.settings.label_steps)


def label_of(trial: dict[str, Any]) -> float:
    """Return y = -log(fid_fp) of a trial: larger is better, and equal ratios count equally."""
    return -float(np.log(max(trial["fid_fp"], 1e-9)))


def trial_keys(run: Run, space: SearchSpace, choices: np.ndarray) -> list[str]:
    return [job_of(run, label_draw(run), space.config(choice).to_labels()).key for choice in choices]


def allowed(most: Callable[[int], int] | None, total: int, free: int, done: int) -> int:
    """Return how many trials there will be: `total`, or what time allows, but enough to learn from.

    Args:
        most: says how many measurements fit, of which some are done.
        total: of the plan.
        free: trials that were there before.
        done: measured since then.
    """
    return total if most is None else min(total, max(free + done, free + most(done), MIN_TRIALS))
