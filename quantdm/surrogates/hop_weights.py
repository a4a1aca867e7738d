"""What the hops of the graph surrogate, and its prior, weigh: least squares on trials that none learned."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from quantdm.surrogates.additive import AdditiveSurrogate

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def moments(scores: Floats) -> tuple[Floats, Floats]:
    """Return mean and standard deviation over trials, by which scores [T, M] are standardised."""
    return scores.mean(axis=0), np.maximum(scores.std(axis=0), 1e-6)


def weigh_hops(z: Floats, y: Floats, weights: Floats, *, prior: bool) -> tuple[Floats, float]:
    """Return w [M] >= 0 and the intercept that minimise sum_t weight · (z[t] · w + intercept - y[t])^2, in y's unit.

    The terms of a prior are linear around the median trial: with one, the better half tells what scores are worth.
    """
    if prior:
        weights = np.where(y >= np.median(y), weights, 0.0)
    root, mean, offset = np.sqrt(weights), np.average(z, axis=0, weights=weights), np.average(y, weights=weights)
    found, _ = nnls(root[:, None] * (z - mean), root * (y - offset))
    return found, float(offset - mean @ found)


def prior_without(
    additive: AdditiveSurrogate, fold: int, choices: Ints, labels: Floats, weights: Floats, watched: Ints
) -> Floats:
    """Return the prior's standardised score of a fold's training trials [T] by a fit without the watched ones."""
    rest = np.setdiff1d(np.arange(len(labels)), watched)
    values = additive.values_of_part(fold, choices[rest], labels[rest], weights[rest])
    score = additive.space.gather(values, choices).sum(axis=1)
    mean, spread = moments(score[rest])
    return (score - mean) / spread
