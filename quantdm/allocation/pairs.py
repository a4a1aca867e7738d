"""Weights and activations chosen together: one pair of options per layer, within a budget of bit operations."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from quantdm.allocation.knapsack import Ints, solve_knapsack
from quantdm.errors import QuantDMError

HALVINGS = 40  # of the interval in which the price of a stored bit is sought


def select_pairs(
    values: ArrayLike,
    input_values: ArrayLike,
    operations: ArrayLike,
    target_bops: int,
    *,
    sizes: ArrayLike | None = None,
    max_bits: int | None = None,
) -> tuple[Ints, Ints]:
    """Choose for every layer an option of its weight and one of its input, with the largest sum of values.

    Errors of weights and of inputs are independent to first order, so values add up. Within the operations alone the
    choice is exact (`solve_knapsack`, which drops dominated pairs); with `max_bits` as well, stored bits have a price,
    the lowest at which they fit.

    Args:
        values, input_values: [L, O] and [L, A], larger is better.
        operations: [L, O, A] bit operations of every pair.
        target_bops: their largest sum.
        sizes, max_bits: [L, O] stored bits of the weights, and their largest sum.

    Returns:
        The choice of weights [L] and of inputs [L].

    Raises:
        QuantDMError: a budget that no choice meets; the reachable range is stated.
    """
    weights, inputs = np.asarray(values, dtype=np.float64), np.asarray(input_values, dtype=np.float64)
    costs = np.asarray(operations, dtype=np.int64)
    least, most = int(costs.min(axis=(1, 2)).sum()), int(costs.max(axis=(1, 2)).sum())
    if target_bops < least:
        raise QuantDMError(f"target_bops: got {target_bops:g}, but these options reach {least:g} to {most:g}")

    def at(price: float) -> tuple[Ints, Ints]:
        own = weights if sizes is None else weights - price * np.asarray(sizes)
        total = (own[:, :, None] + inputs[:, None, :]).reshape(len(own), -1)
        picked = solve_knapsack(list(total), list(costs.reshape(len(own), -1)), int(target_bops))
        return picked // inputs.shape[1], picked % inputs.shape[1]

    def stored(choice: Ints) -> int:
        return int(np.asarray(sizes)[np.arange(len(choice)), choice].sum())

    found = at(0.0)
    if sizes is None or max_bits is None or stored(found[0]) <= max_bits:
        return found
    return _priced(at, stored, float(np.ptp(weights)), max_bits, target_bops)


def _priced(
    at: Callable[[float], tuple[Ints, Ints]], stored: Callable[[Ints], int], most: float, max_bits: int, bops: int
) -> tuple[Ints, Ints]:
    """Return the choice at the lowest price of a stored bit at which the weights fit."""
    low, high = 0.0, max(most, 1e-30)  # at a price of all values a bit, only bits count
    found = at(high)
    if stored(found[0]) > max_bits:
        raise QuantDMError(
            f"target: no choice of these options has {max_bits} bits and {bops:g} bit operations at once; the "
            f"least within the operations are {stored(found[0])} bits"
        )
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5 if low else high * 1e-3
        tried = at(middle)
        if stored(tried[0]) <= max_bits:
            high, found = middle, tried
        elif low and high / middle < 1 + 1e-6:
            break
        else:
            low = middle
    return found
