"""Means and spreads over draws."""

from collections.abc import Sequence

import torch


def mean_and_sd(rows: Sequence[dict[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """Return the mean and the standard deviation (n - 1) of every figure over rows."""
    mean, sd = {}, {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if any(v is None for v in values):
            mean[key] = sd[key] = None
            continue
        column = torch.tensor(values, dtype=torch.float64)
        mean[key] = column.mean().item()
        sd[key] = column.std().item() if len(rows) > 1 else 0.0
    return {"mean": mean, "sd": sd}
