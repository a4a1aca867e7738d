"""What surrogates learn from: checked trials and folds."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantdm.errors import QuantDMError
from quantdm.files import read_json
from quantdm.surrogates.space import SearchSpace


def check_trials(
    space: SearchSpace, choices: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None, *, minimum: int, why: str
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return choices [T, L], labels [T] and weights [T] (mean 1), all fit to learn from.

    Raises:
        QuantDMError: shapes differ, labels are not finite or all equal, weights are not positive, or T < `minimum`.
    """
    choices, labels = space.check(choices), np.asarray(y, dtype=np.float64)
    if labels.shape != (len(choices),):
        raise QuantDMError(f"y: got shape {labels.shape}, expected one label for each of the {len(choices)} trials")
    if len(choices) < minimum:
        raise QuantDMError(f"got {len(choices)} trials, expected at least {minimum}: {why}; sample more configurations")
    if not np.isfinite(labels).all():
        bad = np.flatnonzero(~np.isfinite(labels))
        raise QuantDMError(f"y: {len(bad)} labels are NaN or infinite (first: trial {bad[0]}); evaluate or drop them")
    if np.ptp(labels) <= 1e-12 * max(1.0, float(np.abs(labels).max())):
        raise QuantDMError(f"y: all {len(labels)} labels are {labels[0]:.6g}: nothing to learn; widen the options")
    weights = np.ones(len(labels)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != labels.shape or not np.isfinite(weights).all() or (weights <= 0).any():
        raise QuantDMError(f"sample_weight: expected {len(labels)} positive numbers, got shape {weights.shape}")
    return choices, labels, weights / weights.mean()


def read_record(path: str | Path, space: SearchSpace, version: int) -> dict[str, Any]:
    """Read a surrogate's record and check that it belongs to `space`.

    Raises:
        QuantDMError: missing, damaged, of another version or of another space.
    """
    record = read_json(path, version=version)
    if record.get("space") != space.digest:
        raise QuantDMError(
            f"{path}: fitted on search space {record.get('space')}, given {space.digest}; "
            "it belongs to another model or other options: fit again"
        )
    return record


def split_folds(count: int, folds: int, random_state: int) -> list[NDArray[np.int64]]:
    """Return the held-out trials of every fold: a random partition of `count` trials."""
    order = np.random.default_rng([random_state, count, folds]).permutation(count)
    return [np.sort(order[fold::folds]) for fold in range(folds)]
