"""Which few switches explain a damage: EiG-Search (Lu et al. 2024) with a reference in the place of removal.

A switch is an edge that carries either what the configuration in question sends or what the reference does; damage is a
function of the switches. Its rank is what setting it alone to the reference undoes; the set is the smallest prefix of
the ranking that is both needed and enough.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from quantdm.surrogates.local import Splitting

SHARE = 0.8


@dataclass(frozen=True)
class SmallestSet:
    """A ranking of switches, and how far its first `size` explain the damage.

    `undone` is the share of the damage that goes when the set alone is set to the reference (Fid+ of the paper),
    `missing` the share that is lacking when the set alone stays (Fid-): a set is taken when undone - missing reaches
    the share that was asked for.
    """

    order: tuple[int, ...]  # of the switches that change anything, the one that undoes most first
    single: tuple[float, ...]  # of every switch: the share of the damage that it undoes alone
    size: int
    undone: float
    missing: float

    @property
    def members(self) -> tuple[int, ...]:
        """The switches of the set, the one that undoes most first."""
        return self.order[: self.size]


def smallest_set(
    count: int, damage: Callable[[Collection[int]], float], *, share: float = SHARE, tick: Callable[[], object] = int
) -> SmallestSet:
    """Find the smallest prefix of the ranking of switches with undone - missing >= share.

    The published size rule (the largest difference) keeps nearly all where damages add up, hence a share. Sizes are
    doubled, then bisected: count + 2 + O(4 log count) evaluations.

    Args:
        count: of the switches.
        damage: of the configuration with these switches set to the reference.
        share: of the damage to explain.
        tick: called after every evaluation.
    """

    def valued(switches: Collection[int]) -> float:
        found = damage(switches)
        tick()
        return found

    everything = range(count)
    whole, none = valued(()), valued(everything)
    if whole - none <= 0:
        return SmallestSet((), (0.0,) * count, 0, 0.0, 0.0)
    single = [(whole - valued((switch,))) / (whole - none) for switch in everything]
    order = [int(switch) for switch in np.argsort(-np.array(single), kind="stable") if single[switch] != 0]
    known: dict[int, tuple[float, float]] = {}

    def explained(size: int) -> float:
        if size not in known:
            kept = order[:size]
            undone = (whole - valued(kept)) / (whole - none)
            others = set(everything).difference(kept)
            known[size] = undone, (whole - valued(others)) / (whole - none)
        return known[size][0] - known[size][1]

    size, low = 1, 0
    while size < len(order) and explained(size) < share:
        low, size = size, min(2 * size, len(order))
    while size - low > 1:
        middle = (low + size) // 2
        low, size = (low, middle) if explained(middle) >= share else (middle, size)
    explained(size)
    return SmallestSet(tuple(order), tuple(single), size, *known[size])


def carrying_layers(
    surrogate: Splitting, choice: ArrayLike, reference: ArrayLike, *, share: float = SHARE
) -> SmallestSet:
    """Return the fewest layers whose messages to their block's root explain a predicted difference.

    To a surrogate a layer is an edge into its root: the switch carries what it sends under `choice` [L] or under
    `reference` [L]. The sign of the difference does not matter.
    """
    own, other = (surrogate.space.check(given)[0] for given in (choice, reference))
    ends = surrogate.predict(np.stack([own, other]))
    sign = 1.0 if ends[0] >= ends[1] else -1.0

    def damage(layers: Collection[int]) -> float:
        row = own.copy()
        row[list(layers)] = other[list(layers)]
        return sign * float(surrogate.predict(row[None])[0])

    return smallest_set(len(own), damage, share=share)
