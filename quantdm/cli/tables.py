"""Tables on the terminal."""

import numpy as np
from rich.console import Console
from rich.table import Table

from quantdm.surrogates import Attribution, SearchSpace

# ------------------------------------------------------------------------------------------- attribution, selection


def show_attribution(space: SearchSpace, attributions: dict[str, Attribution]) -> None:
    """Print per operation type how much quality its best and worst options differ by, for every surrogate."""
    types = sorted({layer.op_type for layer in space.layers})
    table = Table(title="value lost by the worst option, summed per operation type")
    table.add_column("operation type")
    table.add_column("weights", justify="right")
    for name in attributions:
        table.add_column(name, justify="right")
    ranges = {name: np.ptp(a.values, axis=1) for name, a in attributions.items()}
    order = sorted(types, key=lambda t: -sum(_of_type(space, r / max(r.sum(), 1e-12), t) for r in ranges.values()))
    for op_type in order:
        weights = sum(layer.num_weights for layer in space.layers if layer.op_type == op_type)
        table.add_row(op_type, f"{weights:,}", *[f"{_of_type(space, r, op_type):.3f}" for r in ranges.values()])
    Console(width=79).print(table)


def _of_type(space: SearchSpace, values: np.ndarray, op_type: str) -> float:
    return float(sum(v for v, layer in zip(values, space.layers, strict=True) if layer.op_type == op_type))
