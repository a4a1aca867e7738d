"""Means and spreads over draws."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

ROUNDING = 1e-9  # a distance below is that of equal pictures

# Figures that count images: they add up over draws.
COUNTS = ("flagged", "constant")


def mean_and_sd(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the mean and the standard deviation (n - 1) of every figure over rows; counts are left to `totals`.

    None where a row has no such value; a single row has no standard deviation.
    """
    mean: dict[str, Any] = {}
    sd: dict[str, Any] = {}
    for key in rows[0]:
        if key in COUNTS:
            continue
        values = [row[key] for row in rows]
        if any(v is None for v in values):
            mean[key] = sd[key] = None
            continue
        column = torch.tensor(values, dtype=torch.float64)
        mean[key] = column.mean().item()
        sd[key] = column.std().item() if len(rows) > 1 else None
    return {"mean": mean, "sd": sd}


def totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the sum of every count over rows."""
    return {key: sum(row[key] for row in rows) for key in COUNTS if key in rows[0]}


def spread(mean: float, sd: float | None, digits: int = 4) -> str:
    """Return "0.0453 ± 0.0031", or the mean alone where there is no standard deviation.

    What these digits would call zero has two that count, "3.3e-06 ± 2e-07", down to ROUNDING.
    """
    if ROUNDING < abs(mean) < 0.5 * 10**-digits:
        return f"{mean:.2g}" if sd is None else f"{mean:.2g} ± {sd:.1g}"
    return f"{mean:.{digits}f}" if sd is None else f"{mean:.{digits}f} ± {sd:.{digits}f}"
