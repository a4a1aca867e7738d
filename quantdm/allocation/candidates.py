"""Configurations that need no search, and ways to pool explanations."""

from collections.abc import Sequence

import numpy as np

from quantdm.allocation import select
from quantdm.surrogates import SearchSpace


def baseline_choices(space: SearchSpace, target_bits: float) -> dict[str, np.ndarray]:
    """Return what needs no search: the smallest uniform bit-width of every method at no fewer bits than the budget,
    and the mix with the least weight error."""
    found = {"baseline: least weight error": select(space, -space.weight_error, target_bits=target_bits)}
    kinds = {(s.method, s.granularity, s.group_size) for s in space.options}
    for kind in sorted(kinds, key=str):
        of_kind = [i for i, s in enumerate(space.options) if (s.method, s.granularity, s.group_size) == kind]
        for index in sorted(of_kind, key=lambda i: space.options[i].bits):
            choice = np.full(len(space.layers), index)
            if space.avg_bits(choice)[0] >= target_bits:
                found[f"baseline: {space.options[index].label}"] = choice
                break
    return found


def mean_of_ranks(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Average value tables [L, O] after scaling each to unit spread within its layers."""
    centred = [table - table.mean(axis=1, keepdims=True) for table in tables]
    return np.mean([table / max(float(table.std()), 1e-12) for table in centred], axis=0)
