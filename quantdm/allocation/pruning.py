"""Options that no layer should take: another costs no more bits there and errs no more."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantdm.quantizers.branches import fits_rank
from quantdm.quantizers.worth import is_wasteful
from quantdm.surrogates import SearchSpace


def replacements(space: SearchSpace) -> NDArray[np.int64]:
    """Return for every layer and option the option to take instead, [L, O]; undominated ones stand for themselves.

    Of the options with no more bits and no larger one-layer noise error it is the one with the least error, and among
    those the smallest.
    """
    found = np.empty(space.bits.shape, dtype=np.int64)
    for layer, (bits, errors) in enumerate(zip(space.bits, space.noise_error, strict=True)):
        order = np.lexsort((bits, errors))  # the least error first, then the fewest bits
        for option in range(len(bits)):
            fits = (bits[order] <= bits[option]) & (errors[order] <= errors[option])
            found[layer, option] = order[int(np.argmax(fits))]
    return found


def fitting(space: SearchSpace) -> NDArray[np.bool_]:
    """Return which options every layer can have at all, [L, O]."""
    return np.array([[fits_rank(layer.shape, option) for option in space.options] for layer in space.layers])


def prune(space: SearchSpace, choices: ArrayLike) -> NDArray[np.int64]:
    """Replace the dominated options of choices [T, L]: no bits more, and no layer worse on its own."""
    return space.gather(replacements(space), choices)


def dominated(space: SearchSpace) -> dict[str, list[str]]:
    """Return layer name -> labels of the options that it should not take, as `select` bars them.

    Barred are also options that cost more bits on the layer than they save, where any other is left.
    """
    barred = replacements(space) != np.arange(len(space.options))
    for layer, record in enumerate(space.layers):
        wasteful = np.array([is_wasteful(record.shape, option, record.split) for option in space.options])
        if not (barred[layer] | wasteful).all():
            barred[layer] |= wasteful
    return {
        name: [space.labels[option] for option in np.flatnonzero(barred[layer])]
        for layer, name in enumerate(space.layer_names)
    }
