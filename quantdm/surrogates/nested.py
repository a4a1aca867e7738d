"""Nested cross-validation: what a fold is judged on takes no part in any choice that is made for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Generic, TypeVar

import numpy as np

from quantdm.surrogates.additive_model import Floats, Ints

Setting = TypeVar("Setting")  # a strength, or what else is chosen with it
Fit = Callable[[Ints, Setting], Floats]  # training trials, setting -> parameters
Path = Callable[[Ints, Sequence[Setting]], list[Floats]]  # the same for several settings, good enough to compare them
Predict = Callable[[Floats, Ints], Floats]  # parameters, trials -> predictions


@dataclass(frozen=True, eq=False)
class Nested(Generic[Setting]):
    """What every fold chose without its own trials, what all trials choose, and predictions that are fit to judge."""

    strength: Setting  # of least held-out error over all folds: for the final fit
    fold_strengths: tuple[Setting, ...]  # chosen inside each fold's training trials
    fold_parameters: Floats  # [K, P] fitted to each fold's training trials with its own strength
    held_out: Floats  # [T] of every trial by the parameters of its fold


def choose_nested(
    fit: Fit[Setting],
    path: Path[Setting],
    predict: Predict,
    strengths: Sequence[Setting],
    labels: Floats,
    weights: Floats,
    folds: list[Ints],
) -> Nested[Setting]:
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
