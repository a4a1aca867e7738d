"""Two explainers that only ask a surrogate for predictions: swaps of one layer, and an estimate of Shapley values.

They know nothing of how a surrogate is built, so they check the attributions that do (`attribute`).
"""

from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantdm.errors import QuantDMError
from quantdm.surrogates.attribution import Attribution, summarise
from quantdm.surrogates.space import SearchSpace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
ROWS = 4096  # configurations per call of predict


class Predictor(Protocol):
    """A fitted surrogate that predicts y from choices."""

    name: str
    space: SearchSpace

    def predict(self, choices: ArrayLike) -> Floats:
        """Predict y: [T, L] -> [T]."""
        ...


def explain_by_swaps(surrogate: Predictor, choices: ArrayLike, *, samples: int = 16, seed: int = 0) -> Attribution:
    """Explain by what changes when one layer alone takes each of its options.

    The mean over `samples` of the given choices [T, L] (trials, or one configuration of interest), without replacement
    and the same for every layer; `spread` is the standard error of that mean. It asks for samples · L · O predictions.

    Raises:
        QuantDMError: the surrogate is not fitted, the choices do not fit its space, or samples < 1.
    """
    rows = _sample(surrogate.space, choices, samples, np.random.default_rng(seed))
    return _explain(surrogate, f"{surrogate.name}: swap one", np.repeat(rows[:, None], rows.shape[1], axis=1))


def explain_by_shapley(surrogate: Predictor, choices: ArrayLike, *, samples: int = 16, seed: int = 0) -> Attribution:
    """Explain by Shapley values, estimated by permutation sampling (Castro et al. 2009).

    A walk takes two of the given choices [T, L], x and z, and a random order of the layers; a layer's turn comes with
    the layers before it as in x and the others as in z. What its options are worth then, less their mean, is averaged
    over the walks: each pair is walked in an order and in its reverse. Along a walk the steps from z's to x's option
    sum to y(x) - y(z). `spread` is the standard error over pairs. It asks for samples · L · O predictions.

    Raises:
        QuantDMError: the surrogate is not fitted, the choices do not fit its space, or samples < 4.
    """
    if samples < 4:
        raise QuantDMError(f"samples: got {samples}, expected at least 4: two pairs of walks for a standard error")
    rng, pairs = np.random.default_rng(seed), samples // 2
    rows = surrogate.space.check(choices)
    contexts = np.empty((2 * pairs, rows.shape[1], rows.shape[1]), dtype=np.int64)
    for pair in range(pairs):
        x, z = rows[rng.choice(len(rows), size=2, replace=len(rows) < 2)]
        turn = rng.permutation(rows.shape[1])  # of every layer
        before = turn[None] < turn[:, None]  # [layer whose turn it is, layer]
        contexts[2 * pair] = np.where(before, x, z)
        contexts[2 * pair + 1] = np.where(before, z, x)
    return _explain(surrogate, f"{surrogate.name}: Shapley", contexts, group=2)


def _explain(surrogate: Predictor, source: str, contexts: Ints, *, group: int = 1) -> Attribution:
    """Average the centred predictions of all options over contexts [S, L, L]: row l is where layer l is varied.

    Runs of `group` contexts are one independent observation.
    """
    samples, layers, options = len(contexts), contexts.shape[1], len(surrogate.space.options)
    found = np.empty((samples, layers, options))
    for index, context in enumerate(contexts):
        varied = np.repeat(context, options, axis=0)  # [L·O, L]
        varied[np.arange(len(varied)), np.repeat(np.arange(layers), options)] = np.tile(np.arange(options), layers)
        parts = [surrogate.predict(varied[start : start + ROWS]) for start in range(0, len(varied), ROWS)]
        found[index] = np.concatenate(parts).reshape(layers, options)
    found -= found.mean(axis=2, keepdims=True)
    found = found.reshape(samples // group, group, layers, options).mean(axis=1)
    spread = found.std(axis=0, ddof=1) / np.sqrt(len(found)) if len(found) > 1 else np.zeros_like(found[0])
    return summarise(source, surrogate.space, found.mean(axis=0), spread)


def _sample(space: SearchSpace, choices: ArrayLike, samples: int, rng: np.random.Generator) -> Ints:
    rows = space.check(choices)
    if samples < 1 or not len(rows):
        raise QuantDMError(f"got {len(rows)} choices and samples {samples}, expected one or more of both")
    return rows if samples >= len(rows) else rows[np.sort(rng.choice(len(rows), size=samples, replace=False))]
