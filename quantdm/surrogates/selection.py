"""From values to a configuration: the exact multiple-choice knapsack, and the whole Pareto set at once.

Cost and value are additive over layers, so the best configuration under a budget is a multiple-choice knapsack
(method.md section 6): maximise sum of values subject to sum of bits <= budget, one option per layer.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantdm.errors import QuantDMError, nearest
from quantdm.surrogates.space import SearchSpace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MAX_STATES = 1_000


def select(
    space: SearchSpace,
    values: ArrayLike,
    *,
    target_bits: float | None = None,
    max_bits: int | None = None,
    pins: Mapping[str, str] | None = None,
    ties: Sequence[Sequence[str]] = (),
) -> Ints:
    """Choose the options with the largest total value within the budget, exactly.

    `values` [L, O], larger is better. The budget is `target_bits` (average per weight, overhead included) or `max_bits`
    (total). `pins` fixes layers (name -> scheme label); the layers of one entry of `ties` take the same option.
    Returns the choice [L].

    Raises:
        QuantDMError: no or two budgets, unknown pins or ties, or a budget outside the reachable range.
    """
    table = check_values(space, values)
    if (target_bits is None) == (max_bits is None):
        raise QuantDMError("select: give exactly one of target_bits (average) and max_bits (total)")
    budget = int(max_bits) if max_bits is not None else budget_of(space, float(target_bits))  # type: ignore[arg-type]
    groups, allowed = _constraints(space, pins or {}, ties)
    group_values = [table[members][:, options].sum(axis=0) for members, options in zip(groups, allowed, strict=True)]
    group_bits = [space.bits[members][:, options].sum(axis=0) for members, options in zip(groups, allowed, strict=True)]
    low = sum(int(bits.min()) for bits in group_bits)
    if budget < low:
        total, high = int(space.num_weights.sum()), sum(int(bits.max()) for bits in group_bits)
        raise QuantDMError(
            f"budget: got {budget / total:.4f} bits per weight ({budget} bits), but with these options, pins and ties "
            f"{low / total:.4f} to {high / total:.4f} can be reached; raise the budget or add options with fewer bits"
        )
    picked = solve_knapsack(group_values, group_bits, budget)
    choice = np.empty(len(space.layers), dtype=np.int64)
    for members, options, pick in zip(groups, allowed, picked, strict=True):
        choice[members] = options[pick]
    assert int(space.total_bits(choice)[0]) <= budget
    return choice


def pareto(space: SearchSpace, values: ArrayLike, num: int = 50) -> list[Ints]:
    """Return up to `num` choices on the convex hull of (bits, value), fewest bits first.

    Sweeps the Lagrangian max sum(value - lambda * bits): for every lambda the layers decouple, so each choice is the
    exact optimum at its own size.
    """
    table = check_values(space, values)
    start, steps = hull_steps(list(table), list(space.bits))
    bits = np.concatenate([[0], np.cumsum([step.extra for step in steps])]) if steps else np.zeros(1)
    # evenly in bits, not in steps: large layers take few steps
    wanted = np.unique(np.searchsorted(bits, np.linspace(0, bits[-1], num)))
    choices, choice = [], start.copy()
    for index in range(len(steps) + 1):
        if index:
            choice[steps[index - 1].index] = steps[index - 1].item
        if index in wanted:
            choices.append(choice.copy())
    return choices


def budget_of(space: SearchSpace, target_bits: float) -> int:
    """Return the total bits that an average of `target_bits` per weight allows, rounded down."""
    if not np.isfinite(target_bits) or target_bits <= 0:
        raise QuantDMError(f"target_bits: got {target_bits}, expected a positive number of bits per weight")
    total = int(space.num_weights.sum())
    budget = int(np.floor(target_bits * total))
    return budget + int((budget + 1) / total <= target_bits)  # a target computed as bits / weights must allow itself


def check_values(space: SearchSpace, values: ArrayLike) -> Floats:
    """Return values as float64 [L, O].

    Raises:
        QuantDMError: wrong shape or not finite.
    """
    table = np.asarray(values, dtype=np.float64)
    shape = (len(space.layers), len(space.options))
    if table.shape != shape:
        raise QuantDMError(f"values: got shape {table.shape}, expected [layers, options] = {shape}")
    if not np.isfinite(table).all():
        raise QuantDMError(f"values: {int((~np.isfinite(table)).sum())} of {table.size} are NaN or infinite")
    return table


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
    start, steps = hull_steps(values, bits)
    spent = sum(int(bit[item]) for bit, item in zip(bits, start, strict=True))
    assert spent <= budget
    rate = 0.0  # λ: the price of a bit at which the hull solution stops fitting
    for step in steps:
        spent += step.extra
        if spent > budget:
            rate = step.rate
            break
    best = fill_budget(values, bits, budget)
    reached = sum(float(value[item]) for value, item in zip(values, best, strict=True))
    priced = [value - rate * bit for value, bit in zip(values, bits, strict=True)]
    tops = np.array([float(price.max()) for price in priced])
    bound = float(tops.sum()) + rate * budget
    slack = bound - reached + 1e-12 * (abs(bound) + abs(reached))
    kept = [np.flatnonzero(price >= top - slack) for price, top in zip(priced, tops, strict=True)]
    kept = [keep[_undominated(value[keep], bit[keep])] for keep, value, bit in zip(kept, values, bits, strict=True)]
    # A state: bits spent, value, value lost against the bound. Classes with one item come first: they branch nothing.
    order = sorted(range(len(kept)), key=lambda index: (len(kept[index]), index))
    least_after = np.cumsum([0] + [int(bits[index][kept[index]].min()) for index in reversed(order)])[::-1]
    cost, gain, lost = np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1)
    trail: list[tuple[Ints, Ints]] = []
    for place, index in enumerate(order):
        keep = kept[index]
        new_cost = (cost[:, None] + bits[index][keep]).ravel()
        new_gain = (gain[:, None] + values[index][keep]).ravel()
        new_lost = (lost[:, None] + (tops[index] - priced[index][keep])).ravel()
        fits = np.flatnonzero((new_lost <= slack) & (new_cost <= budget - least_after[place + 1]))
        fits = _thinned(fits[_undominated(new_gain[fits], new_cost[fits])], new_lost)
        if not len(fits):
            return best
        trail.append((fits // len(keep), keep[fits % len(keep)]))
        cost, gain, lost = new_cost[fits], new_gain[fits], new_lost[fits]
    state = int(np.argmax(gain))
    if gain[state] < reached:
        return best
    for place in range(len(order) - 1, -1, -1):
        parents, items = trail[place]
        best[order[place]] = items[state]
        state = int(parents[state])
    return best


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


def _constraints(
    space: SearchSpace, pins: Mapping[str, str], ties: Sequence[Sequence[str]]
) -> tuple[list[Ints], list[Ints]]:
    """Return the groups of layers that choose together, and the options that each group may choose."""
    for name in [*pins, *(name for tie in ties for name in tie)]:
        if name not in space.layer_index:
            raise QuantDMError(f"layer {name!r} is not in this model; {nearest(name, space.layer_names)}")
    for name, label in pins.items():
        if label not in space.labels:
            raise QuantDMError(f"pin of {name!r}: {label!r} is no option; {nearest(label, space.labels)}")
    group_of = np.arange(len(space.layers))
    for tie in ties:
        members = np.array([space.layer_index[name] for name in tie], dtype=np.int64)
        group_of[np.isin(group_of, group_of[members])] = group_of[members].min(initial=len(group_of))
    groups = [np.flatnonzero(group_of == group) for group in np.unique(group_of)]
    allowed = []
    for members in groups:
        wanted = {space.layer_names[m]: pins[space.layer_names[m]] for m in members if space.layer_names[m] in pins}
        if len(set(wanted.values())) > 1:
            raise QuantDMError(f"pins: tied layers are pinned to different schemes: {wanted}")
        allowed.append(
            np.array([space.labels.index(label) for label in set(wanted.values())] or range(len(space.options)))
        )
    return groups, allowed
