"""The attribution: what every option of every layer is worth, as one record for all surrogates."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantdm.errors import QuantDMError
from quantdm.files import read_json, write_json
from quantdm.surrogates.space import SearchSpace

Floats = NDArray[np.float64]
ATTRIBUTION_VERSION = 1
Table = dict[str, dict[str, float]]


class Explainable(Protocol):
    """A fitted surrogate: it says what its final model and its folds give to every layer and option."""

    name: str
    space: SearchSpace

    def fold_values(self) -> Floats:
        """Return values [K, L, O]; larger is better, additive over layers."""
        ...


@dataclass(frozen=True, eq=False)
class Attribution:
    """Values [L, O] in units of y (larger is better, additive over layers; every layer's values average to 0).

    `spread` [L, O] is the standard deviation over folds. `by_op_type` and `by_method` hold means over layers (of the
    type; per method and bits), `by_block` sums over the block's layers: what the whole block gains or loses.
    """

    source: str
    layers: tuple[str, ...]
    options: tuple[str, ...]
    values: Floats
    spread: Floats
    by_op_type: Table
    by_block: Table
    by_method: Table

    def total(self, choices: ArrayLike) -> Floats:
        """Return the additive score of choices: [T, L] -> [T]."""
        choices = np.atleast_2d(np.asarray(choices))
        return self.values[np.arange(len(self.layers)), choices].sum(axis=1)

    def to_dict(self) -> dict[str, Any]:
        """Return the attribution as a JSON record with a version."""
        return {
            "version": ATTRIBUTION_VERSION,
            "source": self.source,
            "layers": list(self.layers),
            "options": list(self.options),
            "values": self.values.tolist(),
            "spread": self.spread.tolist(),
            "by_op_type": self.by_op_type,
            "by_block": self.by_block,
            "by_method": self.by_method,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Attribution":
        """Read `to_dict`'s record.

        Raises:
            QuantDMError: another version, a missing field, or arrays that do not fit the names.
        """
        if record.get("version") != ATTRIBUTION_VERSION:
            raise QuantDMError(f"attribution: got version {record.get('version')}, expected {ATTRIBUTION_VERSION}")
        try:
            found = cls(
                source=record["source"],
                layers=tuple(record["layers"]),
                options=tuple(record["options"]),
                values=np.array(record["values"], dtype=np.float64),
                spread=np.array(record["spread"], dtype=np.float64),
                by_op_type=record["by_op_type"],
                by_block=record["by_block"],
                by_method=record["by_method"],
            )
        except KeyError as error:
            raise QuantDMError(f"attribution: {error} is missing; run the explain stage again") from None
        shape = (len(found.layers), len(found.options))
        if found.values.shape != shape or found.spread.shape != shape:
            raise QuantDMError(f"attribution: values {found.values.shape}, spread {found.spread.shape}, not {shape}")
        return found

    def save(self, path: str | Path) -> None:
        """Write the attribution as JSON."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "Attribution":
        """Read an attribution written by `save`."""
        return cls.from_dict(read_json(path, version=ATTRIBUTION_VERSION))


def attribute(surrogate: Explainable) -> Attribution:
    """Explain a fitted surrogate: mean and spread over its folds of the value of every layer and option.

    Values are centred per layer, which changes no choice and makes layers comparable: a layer whose values differ much
    is one where precision is worth its bits.

    Raises:
        QuantDMError: the surrogate is not fitted.
    """
    folds = surrogate.fold_values()
    folds = folds - folds.mean(axis=2, keepdims=True)
    return summarise(surrogate.name, surrogate.space, folds.mean(axis=0), folds.std(axis=0))


def summarise(source: str, space: SearchSpace, values: Floats, spread: Floats) -> Attribution:
    """Build the record from values and spread [L, O] of one space."""
    op_types = np.array([layer.op_type for layer in space.layers])
    blocks = np.array([layer.block for layer in space.layers])
    methods = dict.fromkeys(option.label.rsplit("-", 1)[0] for option in space.options)
    mean = values.mean(axis=0)
    return Attribution(
        source=source,
        layers=space.layer_names,
        options=space.labels,
        values=values,
        spread=spread,
        by_op_type={t: _row(space, values[op_types == t].mean(axis=0)) for t in dict.fromkeys(op_types.tolist())},
        by_block={b: _row(space, values[blocks == b].sum(axis=0)) for b in dict.fromkeys(blocks.tolist())},
        by_method={
            method: {
                str(option.bits): float(mean[index])
                for index, option in enumerate(space.options)
                if option.label.rsplit("-", 1)[0] == method
            }
            for method in methods
        },
    )


def _row(space: SearchSpace, values: Floats) -> dict[str, float]:
    return dict(zip(space.labels, values.tolist(), strict=True))
