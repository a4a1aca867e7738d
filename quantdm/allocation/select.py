"""From values to a configuration: within a budget exactly, by the paper's price per bit, or the whole Pareto set."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from quantdm.allocation.knapsack import Ints, hull_steps, solve_knapsack
from quantdm.allocation.units import Forbidden, Unit, assemble, budget_for, build_units
from quantdm.errors import QuantDMError
from quantdm.surrogates.block_scores import BlockScores
from quantdm.surrogates.space import SearchSpace


def select(
    space: SearchSpace,
    values: ArrayLike,
    *,
    target_bits: float | None = None,
    max_bits: int | None = None,
    blocks: Sequence[BlockScores] = (),
    pins: Mapping[str, str] | None = None,
    ties: Sequence[Sequence[str]] = (),
    forbidden: Forbidden = (),
) -> Ints:
    """Choose the options with the largest total value within the budget, exactly.

    `values` [L, O], larger is better. The budget is `target_bits` (average per weight, overhead included) or `max_bits`
    (total). With `blocks` (their scores, see `score_blocks`) whole blocks are chosen: one assignment each, worth its
    score plus the values of its layers. `pins` fixes layers (name -> scheme label); the layers of one entry of `ties`
    take the same option; `forbidden` bars schemes everywhere (labels) or per layer (name -> labels).
    Returns the choice [L].

    Raises:
        QuantDMError: no or two budgets, unknown or contradicting pins, ties or forbidden schemes, or a budget outside
            the reachable range.
    """
    units = build_units(space, values, blocks=blocks, pins=pins, ties=ties, forbidden=forbidden)
    budget = budget_for(space, units, target_bits, max_bits)
    picked = solve_knapsack([unit.values for unit in units], [unit.bits for unit in units], budget)
    choice = assemble(space, units, picked)
    assert int(space.total_bits(choice)[0]) <= budget
    return choice


def select_lambda(
    space: SearchSpace,
    values: ArrayLike,
    *,
    price: float | None = None,
    target_bits: float | None = None,
    max_bits: int | None = None,
    blocks: Sequence[BlockScores] = (),
    pins: Mapping[str, str] | None = None,
    ties: Sequence[Sequence[str]] = (),
    forbidden: Forbidden = (),
) -> tuple[Ints, float]:
    """Choose by the paper's rule: every layer or block alone takes its largest value - λ · bits.

    λ is `price`, in value per average bit of the whole denoiser (the paper's y = -FID - λ · bits), or the lowest λ
    whose choice meets `target_bits` or `max_bits`. A tie goes to fewer bits. Other arguments are those of `select`,
    whose choice has at least the value of this one at the same budget.
    Returns the choice [L] and λ.

    Raises:
        QuantDMError: as `select`; a price that is negative or not finite, or beside a budget.
    """
    units = build_units(space, values, blocks=blocks, pins=pins, ties=ties, forbidden=forbidden)
    total = int(space.num_weights.sum())
    if price is not None:
        if target_bits is not None or max_bits is not None:
            raise QuantDMError("select_lambda: give a price or a budget (target_bits or max_bits), not both")
        if not np.isfinite(price) or price < 0:
            raise QuantDMError(f"price: got {price}, expected the value of one average bit, 0 or more")
        return assemble(space, units, _argmax_at(units, price / total)), float(price)
    budget = budget_for(space, units, target_bits, max_bits)
    start, steps = hull_steps([unit.values for unit in units], [unit.bits for unit in units])
    spent, rate = sum(int(unit.bits[item]) for unit, item in zip(units, start, strict=True)), 0.0
    for step in steps:
        spent += step.extra
        if spent > budget:
            rate = step.rate
            break
    picked = _argmax_at(units, rate)
    margin = 1e-15
    # at its own rate a step is a tie, which rounding may decide either way: raise λ by the least that decides it
    while sum(int(unit.bits[pick]) for unit, pick in zip(units, picked, strict=True)) > budget:
        picked = _argmax_at(units, rate := rate * (1 + margin) + 1e-300)
        margin *= 2
    return assemble(space, units, picked), rate * total


def pareto(
    space: SearchSpace,
    values: ArrayLike,
    num: int = 50,
    *,
    blocks: Sequence[BlockScores] = (),
    pins: Mapping[str, str] | None = None,
    ties: Sequence[Sequence[str]] = (),
    forbidden: Forbidden = (),
) -> list[Ints]:
    """Return up to `num` choices on the convex hull of (bits, value), fewest bits first (arguments as for `select`).

    Sweeps the Lagrangian max sum(value - lambda * bits): for every lambda the units decouple, so each choice is the
    exact optimum at its own size.
    """
    units = build_units(space, values, blocks=blocks, pins=pins, ties=ties, forbidden=forbidden)
    start, steps = hull_steps([unit.values for unit in units], [unit.bits for unit in units])
    bits = np.concatenate([[0], np.cumsum([step.extra for step in steps])]) if steps else np.zeros(1)
    # evenly in bits, not in steps: large layers take few steps
    wanted = np.unique(np.searchsorted(bits, np.linspace(0, bits[-1], num)))
    choices, picked = [], start.copy()
    for index in range(len(steps) + 1):
        if index:
            picked[steps[index - 1].index] = steps[index - 1].item
        if index in wanted:
            choices.append(assemble(space, units, picked))
    return choices


def _argmax_at(units: Sequence[Unit], rate: float) -> list[int]:
    """Return the item of every unit with the largest value - rate · bits, of equal ones that with the fewest bits."""
    picked = []
    for unit in units:
        priced = unit.values - rate * unit.bits
        picked.append(int(np.lexsort((unit.bits, -priced))[0]))
    return picked
