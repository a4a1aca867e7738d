"""Configurations that need no search, and ways to pool explanations."""

from collections.abc import Sequence

import numpy as np

from quantdm.allocation import select
from quantdm.allocation.pruning import fitting
from quantdm.schemes import ORIGINAL
from quantdm.surrogates import SearchSpace

BASELINE = "baseline: "  # before the names of configurations that need no search
LEAST_WEIGHT_ERROR = f"{BASELINE}least weight error"


def baseline_choices(space: SearchSpace, target_bits: float) -> dict[str, np.ndarray]:
    """Return what needs no search: one scheme everywhere, the smallest of every method at no fewer bits than the
    budget (where none has as many: the largest of all), and the mix with the least weight error."""
    mix = select(space, -space.weight_error, target_bits=target_bits)
    found, uniform = {LEAST_WEIGHT_ERROR: mix}, {}
    everywhere = {scheme: np.full(len(space.layers), index) for index, scheme in enumerate(space.options)}
    fits = [bool(column.all()) for column in fitting(space).T]
    everywhere = {s: choice for fit, (s, choice) in zip(fits, everywhere.items(), strict=True) if fit and s != ORIGINAL}
    size = {scheme: float(space.avg_bits(choice)[0]) for scheme, choice in everywhere.items()}
    for scheme in sorted(everywhere, key=lambda s: size[s]):
        if size[scheme] >= target_bits:
            uniform.setdefault((scheme.method, scheme.granularity, scheme.group_size), scheme)
    schemes = sorted(uniform.values(), key=lambda s: s.label) or [max(size, key=lambda s: size[s])]
    return found | {f"{BASELINE}{scheme.label}": everywhere[scheme] for scheme in schemes}


def mean_of_standardised(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Average value tables [L, O], each centred per layer and scaled to unit spread over all layers and options."""
    centred = [table - table.mean(axis=1, keepdims=True) for table in tables]
    return np.mean([table / max(float(table.std()), 1e-12) for table in centred], axis=0)
