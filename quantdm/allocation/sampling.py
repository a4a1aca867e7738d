"""Which configurations to try: random mixes spread over all sizes, and mixes near the frontier.

Trial i draws from its own generator (seed, i), so a longer list starts with the shorter one and a run can be extended.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantdm.allocation.knapsack import fill_budget
from quantdm.allocation.units import check_values
from quantdm.errors import QuantDMError
from quantdm.schemes import ORIGINAL
from quantdm.surrogates.space import SearchSpace

Ints = NDArray[np.int64]
DRAWS = 16  # candidates per trial; the one nearest to the trial's size is taken
ATTEMPTS = 50


def sample_configs(space: SearchSpace, count: int, *, seed: int, target_bits: float | None = None) -> Ints:
    """Draw `count` distinct random choices [T, L], stratified over average bits.

    Even trials follow the paper's two-level scheme (each layer takes the low bit-width with probability p, else the
    high one; the pair is drawn too), odd ones a Dirichlet over all bit-widths; the method is uniform over those that
    have the bit-width. Sizes cover the range that quantizing reaches evenly, or target_bits ± 0.75 when a target is
    given; layers that stay as they are come with the frontier alone.

    Raises:
        QuantDMError: the space has fewer distinct configurations, or the target is out of reach.
    """
    widths = np.array(sorted({option.bits for option in space.options if option != ORIGINAL}))
    of_width = [np.flatnonzero([option.bits == width for option in space.options]) for width in widths]
    per_width = np.stack([space.bits[:, options].mean(axis=1) for options in of_width], axis=1)  # [L, W]
    low, high = per_width[:, 0].sum() / space.num_weights.sum(), per_width[:, -1].sum() / space.num_weights.sum()
    if target_bits is not None:
        _check_reachable(space, target_bits)
        low, high = max(low, target_bits - 0.75), min(high, target_bits + 0.75)
    average = per_width.sum(axis=0) / space.num_weights.sum()  # size of the model when all layers have one width

    def draw(index: int, rng: np.random.Generator) -> Ints:
        goal = low + (high - low) * _van_der_corput(index + 1)
        shares = _two_level(average, goal, rng) if index % 2 == 0 else _dirichlet(average, goal, rng)
        width = _categorical(shares, (DRAWS, len(space.layers)), rng)
        method = rng.random(width.shape)
        options = np.stack([of[(method * len(of)).astype(int)] for of in of_width])  # [W, DRAWS, L]
        choices = np.take_along_axis(options, width[None], axis=0)[0]
        return choices[np.argmin(np.abs(space.avg_bits(choices) - goal))]

    return _collect(space, count, seed, draw)


def sample_frontier(
    space: SearchSpace,
    values: ArrayLike,
    count: int,
    *,
    target_bits: float,
    spread: float = 0.4,
    noise: float = 0.7,
    seed: int,
    allow_fewer: bool = False,
) -> Ints:
    """Draw `count` distinct choices [T, L] near the frontier (docs/method.md, Trials and label).

    What each option loses against the best of its layer under `values` [L, O] (larger is better, e.g. minus the
    one-layer noise errors) is multiplied by log-normal noise of standard deviation `noise`, half of it shared by the
    layer; then the knapsack is solved at target_bits ± spread. With `allow_fewer` goals where nothing new comes are
    left out: when the best options of all layers together fit the budget, noise changes little.

    Raises:
        QuantDMError: values of another shape, target out of reach, or too few distinct configurations.
    """
    table = check_values(space, values)
    _check_reachable(space, target_bits)
    loss = table.max(axis=1, keepdims=True) - table
    total = int(space.num_weights.sum())
    cheapest, dearest = int(space.bits.min(axis=1).sum()), int(space.bits.max(axis=1).sum())

    def draw(index: int, rng: np.random.Generator) -> Ints:
        goal = target_bits + spread * (2 * _van_der_corput(index + 1) - 1)
        # Beyond the ends there is one configuration only: goals are mirrored there.
        goal = cheapest / total + abs(goal - cheapest / total)
        goal = dearest / total - abs(dearest / total - goal)
        factors = rng.normal(size=(len(loss), 1)) + rng.normal(size=loss.shape)
        noisy = -loss * np.exp(noise / np.sqrt(2) * factors)
        return fill_budget(list(noisy), list(space.bits), max(cheapest, int(goal * total)))

    return _collect(space, count, seed, draw, allow_fewer=allow_fewer)


def _collect(
    space: SearchSpace,
    count: int,
    seed: int,
    draw: Callable[[int, np.random.Generator], Ints],
    *,
    allow_fewer: bool = False,
) -> Ints:
    """Draw trial after trial, each until it differs from all before it."""
    if count < 1:
        raise QuantDMError(f"count: got {count}, expected 1 or more configurations")
    seen: dict[bytes, Ints] = {}
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        for _ in range(ATTEMPTS):
            choice = draw(index, rng)
            if choice.tobytes() not in seen:
                seen[choice.tobytes()] = choice
                break
        else:
            if allow_fewer and seen:
                continue
            raise QuantDMError(
                f"got only {index} distinct configurations ({len(space.layers)} layers x {len(space.options)} options) "
                f"where {count} were asked for; ask for fewer, or allow more options"
            )
    return np.stack(list(seen.values()))


def _check_reachable(space: SearchSpace, target_bits: float) -> None:
    total = int(space.num_weights.sum())
    low, high = (int(bits.sum()) / total for bits in (space.bits.min(axis=1), space.bits.max(axis=1)))
    if not low <= target_bits <= high:
        raise QuantDMError(
            f"target_bits: got {target_bits}, expected {low:.4f} to {high:.4f}, what these options reach"
        )


def _van_der_corput(index: int) -> float:
    """Return the base-2 radical inverse of `index`: every prefix covers [0, 1) evenly."""
    return int(f"{index:b}"[::-1], 2) / (1 << index.bit_length())


def _two_level(average: NDArray[np.float64], goal: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the shares of the widths: two of them, mixed so that the expected size is the goal."""
    last = len(average) - 1
    low = int(rng.choice(max(1, int((average <= goal).sum()))))
    least = min(max(low + 1, int((average < goal).sum())), last)  # a goal may be above all: schemes of a width differ
    high = int(rng.integers(least, last + 1)) if low < last else low
    shares = np.zeros(len(average))
    p = 1.0 if high == low else float(np.clip((average[high] - goal) / (average[high] - average[low]), 0, 1))
    shares[low] += p
    shares[high] += 1 - p
    return shares


def _dirichlet(average: NDArray[np.float64], goal: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the shares of the widths: of 64 uniform draws from the simplex, the one whose size is nearest the goal."""
    shares = rng.dirichlet(np.ones(len(average)), size=64)
    return shares[np.argmin(np.abs(shares @ average - goal))]


def _categorical(shares: NDArray[np.float64], shape: tuple[int, ...], rng: np.random.Generator) -> Ints:
    return np.minimum(np.searchsorted(np.cumsum(shares), rng.random(shape), side="right"), len(shares) - 1)
