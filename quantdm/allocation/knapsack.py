"""The multiple-choice knapsack: exact, in integers.

Cost and value are additive over layers, so the best configuration under a budget is a multiple-choice knapsack:
maximise sum of values subject to sum of bits <= budget, one option per layer, or one assignment per block.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MAX_STATES = 1_000


class Step(NamedTuple):
    """One upgrade along the convex hull of a class."""

    rate: float  # value per bit
    index: int  # class
    item: int
    extra: int  # bits


def solve_knapsack(values: Sequence[Floats], bits: Sequence[Ints], budget: int) -> Ints:
    """Solve max sum(value) s.t. sum(bits) <= budget, one item per class, to optimality and in exact integers.

    Classes may differ in size; the caller guarantees that the budget is feasible. The Lagrangian bound
    U = sum of max(value - λ·bits) + λ·budget, with λ where the greedy filling stops, tells for every item the most that
    a solution with it can reach; what stays below the greedy solution is dropped (Sinha and Zoltners 1979). Dynamic
    programming over the few items left, with the same bound on every partial sum, gives the optimum. No tolerance of a
    general MILP solver is involved; the tests compare with `scipy.optimize.milp`. Only where values are nearly
    proportional to bits do more than MAX_STATES partial sums compete: then the best of each range of costs are kept,
    and the loss stays far below what the values mean (the tests hold it under 1e-6 of the range).
    Returns the item of every class.
    """
    rate = _critical_rate(values, bits, budget)
    best = fill_budget(values, bits, budget)
    reached = sum(float(value[item]) for value, item in zip(values, best, strict=True))
    priced = [value - rate * bit for value, bit in zip(values, bits, strict=True)]
    tops = np.array([float(price.max()) for price in priced])
    bound = float(tops.sum()) + rate * budget
    slack = bound - reached + 1e-12 * (abs(bound) + abs(reached))
    kept = [np.flatnonzero(price >= top - slack) for price, top in zip(priced, tops, strict=True)]
    kept = [keep[_undominated(value[keep], bit[keep])] for keep, value, bit in zip(kept, values, bits, strict=True)]
    losses = [top - price for top, price in zip(tops, priced, strict=True)]
    found = _search_kept(kept, values, bits, losses, slack, budget)
    if found is None or found[0] < reached:
        return best
    return found[1]


def _critical_rate(values: Sequence[Floats], bits: Sequence[Ints], budget: int) -> float:
    """Return λ, the price of a bit at which the hull solution stops fitting; 0 where everything fits."""
    start, steps = hull_steps(values, bits)
    spent = sum(int(bit[item]) for bit, item in zip(bits, start, strict=True))
    assert spent <= budget
    for step in steps:
        spent += step.extra
        if spent > budget:
            return step.rate
    return 0.0


def _search_kept(
    kept: Sequence[Ints],
    values: Sequence[Floats],
    bits: Sequence[Ints],
    losses: Sequence[Floats],
    slack: float,
    budget: int,
) -> tuple[float, Ints] | None:
    """Return the best value over the kept items and the item of every class; None when no state is left.

    A state is: bits spent, value, value lost against the bound (`losses` per item, `slack` in all).
    """
    # classes with one item come first: they branch nothing
    order = sorted(range(len(kept)), key=lambda index: (len(kept[index]), index))
    least_after = np.cumsum([0] + [int(bits[index][kept[index]].min()) for index in reversed(order)])[::-1]
    cost, gain, lost = np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1)
    trail: list[tuple[Ints, Ints]] = []
    for place, index in enumerate(order):
        keep = kept[index]
        new_cost = (cost[:, None] + bits[index][keep]).ravel()
        new_gain = (gain[:, None] + values[index][keep]).ravel()
        new_lost = (lost[:, None] + losses[index][keep]).ravel()
        fits = np.flatnonzero((new_lost <= slack) & (new_cost <= budget - least_after[place + 1]))
        fits = _thinned(fits[_undominated(new_gain[fits], new_cost[fits])], new_lost)
        if not len(fits):
            return None
        trail.append((fits // len(keep), keep[fits % len(keep)]))
        cost, gain, lost = new_cost[fits], new_gain[fits], new_lost[fits]
    state = last = int(np.argmax(gain))
    choice = np.empty(len(kept), dtype=np.int64)
    for index, (parents, items) in zip(reversed(order), reversed(trail), strict=True):
        choice[index] = items[state]
        state = int(parents[state])
    return float(gain[last]), choice


def hull_steps(values: Sequence[Floats], bits: Sequence[Ints]) -> tuple[Ints, list[Step]]:
    """Return the cheapest choice and the upgrades in order of falling value per bit."""
    start, steps = [], []
    for index, (value, bit) in enumerate(zip(values, bits, strict=True)):
        hull: list[int] = []
        for item in _undominated(value, bit):
            while len(hull) > 1 and _rate(value, bit, hull[-1], item) >= _rate(value, bit, hull[-2], hull[-1]):
                hull.pop()
            hull.append(int(item))
        start.append(hull[0])
        for before, after in pairwise(hull):
            steps.append(Step(_rate(value, bit, before, after), index, after, int(bit[after] - bit[before])))
    # stable: inside a class the rates fall strictly, so its upgrades stay in order
    return np.array(start, dtype=np.int64), sorted(steps, key=lambda step: -step.rate)


def fill_budget(values: Sequence[Floats], bits: Sequence[Ints], budget: int) -> Ints:
    """Spend a budget greedily along the hull: fast, and near the optimum when the classes are many."""
    choice, steps = hull_steps(values, bits)
    spent = sum(int(bit[item]) for bit, item in zip(bits, choice, strict=True))
    blocked: set[int] = set()
    for step in steps:
        if step.index in blocked or spent + step.extra > budget:
            blocked.add(step.index)
            continue
        choice[step.index], spent = step.item, spent + step.extra
    return choice


def _thinned(states: Ints, lost: Floats) -> Ints:
    """Keep at most MAX_STATES states (sorted by cost), the one that lost least of each run of neighbours."""
    if len(states) <= MAX_STATES:
        return states
    bucket = np.arange(len(states)) * MAX_STATES // len(states)
    order = np.lexsort((lost[states], bucket))
    return states[np.sort(order[np.unique(bucket[order], return_index=True)[1]])]


def _rate(value: Floats, bits: Ints, before: int, after: int) -> float:
    return float(value[after] - value[before]) / float(bits[after] - bits[before])


def _undominated(value: Floats, bits: Ints) -> Ints:
    """Return the items for which no other has at most as many bits and at least the value; fewest bits first."""
    order = np.lexsort((-value, bits))
    best = np.maximum.accumulate(value[order])
    keep = np.concatenate([[True], value[order][1:] > best[:-1]])
    return order[keep]
