"""Embedding tables: layers of their own kind, whose rows are looked up and never multiplied."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from torch import nn

from quantdm.denoisers.names import op_type_of, weights_below
from quantdm.denoisers.weights import weight_specs


@dataclass(frozen=True)
class TableRecord:
    """One embedding table of a network; `shape` is [rows, width]."""

    name: str
    op_type: str
    shape: tuple[int, ...]
    kind: Literal["embedding"] = "embedding"
    block: str = ""
    split: None = None

    @property
    def num_weights(self) -> int:
        """Entries of the table."""
        return math.prod(self.shape)


def list_tables(model: nn.Module) -> tuple[TableRecord, ...]:
    """Return the embedding tables of a network that can be quantized, in `named_modules()` order.

    Left out are tables that share their weight with another module, which would cost its bytes twice, and tables with
    `max_norm`, which torch changes in place when a row is looked up. Works on real, meta and quantized models alike.
    """
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    shared = {*tied, *tied.values()}
    below = weights_below(spec.name for spec in weight_specs(model))
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or module.max_norm is not None:
            continue
        weight = module.weight
        is_own = owners[id(module._parameters.get("weight"))] < 2 and f"{name}.weight" not in shared
        if is_own and weight.dtype.is_floating_point and math.prod(weight.shape):
            found.append(TableRecord(name, op_type_of(name, below), tuple(weight.shape)))
    return tuple(found)
