"""Nested cross-validation: what a fold is judged on takes no part in any choice that is made for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from quantdm.surrogates.additive_model import Floats, Ints

Fit = Callable[[Ints, float], Floats]  # training trials, strength -> parameters
Path = Callable[[Ints, Sequence[float]], list[Floats]]  # the same for several strengths, good enough to compare them
Predict = Callable[[Floats, Ints], Floats]  # parameters, trials -> predictions


@dataclass(frozen=True, eq=False)
class Nested:
    """What every fold chose without its own trials, what all trials choose, and predictions that are fit to judge."""

    strength: float  # of least held-out error over all folds: for the final fit
    fold_strengths: tuple[float, ...]  # chosen inside each fold's training trials
    fold_parameters: Floats  # [K, P] fitted to each fold's training trials with its own strength
    held_out: Floats  # [T] of every trial by the parameters of its fold


def choose_nested(
    fit: Fit,
    path: Path,
    predict: Predict,
    strengths: Sequence[float],
    labels: Floats,
    weights: Floats,
    folds: list[Ints],
) -> Nested:
    """Choose a strength for every fold by inner folds, and one for all trials.

    The inner folds of fold k are the other folds. A fit without folds j and k then serves k (judged on j) and j (judged
    on k), so nesting costs K (K - 1) / 2 smaller fits per strength and not K (K - 1).
    """
    outer_error, inner_error = np.zeros(len(strengths)), np.zeros((len(folds), len(strengths)))

    def train(*unseen: Ints) -> Ints:
        return np.setdiff1d(np.arange(len(labels)), np.concatenate(unseen))

    def errors(fits: list[Floats], fold: Ints) -> Floats:
        return np.array([(weights[fold] * (predict(own, fold) - labels[fold]) ** 2).sum() for own in fits])

    for fold in folds:
        outer_error += errors(path(train(fold), strengths), fold)
    for j, k in combinations(range(len(folds)), 2):
        fits = path(train(folds[j], folds[k]), strengths)
        inner_error[k] += errors(fits, folds[j])
        inner_error[j] += errors(fits, folds[k])
    chosen = inner_error.argmin(axis=1)
    parameters = np.stack([fit(train(fold), strengths[index]) for fold, index in zip(folds, chosen, strict=True)])
    held_out = np.empty(len(labels))
    for fold, own in zip(folds, parameters, strict=True):
        held_out[fold] = predict(own, fold)
    best = strengths[int(outer_error.argmin())]
    return Nested(best, tuple(strengths[index] for index in chosen), parameters, held_out)
