"""The search space of one denoiser: layers x options with the exact bits and the cheap errors of every cell."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantdm.denoisers.graph import Graph
from quantdm.denoisers.inventory import LayerRecord
from quantdm.errors import QuantDMError, nearest
from quantdm.files import digest, read_json, write_json
from quantdm.schemes import ORIGINAL, QuantConfig, Scheme, parse_option

SPACE_VERSION = 1


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """Everything about a denoiser that a surrogate may know before the first trial.

    Layer axis L in the order of `layers`, option axis O in the order of `options`. `bits` [L, O] are exact (codes and
    overhead); `weight_error` [L, O] is mean|w-ŵ|^2.4 / mean|w|^2.4; `noise_error` [L, O] is the relative teacher-forced
    error of the denoiser's output when only this layer takes this option.

    Raises:
        QuantDMError: an array has the wrong shape, is not finite or is negative, or a layer is missing in the graph.
    """

    layers: tuple[LayerRecord, ...]
    graph: Graph
    options: tuple[Scheme, ...]
    bits: NDArray[np.int64]
    weight_error: NDArray[np.float64]
    noise_error: NDArray[np.float64]

    def __post_init__(self) -> None:
        shape = (len(self.layers), len(self.options))
        if 0 in shape or len(set(self.options)) != shape[1] or len(set(self.layer_names)) != shape[0]:
            raise QuantDMError(f"search space: {shape[0]} layers and {shape[1]} options, expected some, all distinct")
        for name, dtype in (("bits", np.int64), ("weight_error", np.float64), ("noise_error", np.float64)):
            array = np.array(getattr(self, name), dtype=dtype)
            if array.shape != shape:
                raise QuantDMError(f"search space: {name} has shape {array.shape}, expected [L, O] = {shape}")
            if not np.isfinite(array).all() or (array < 0).any():
                layer = self.layer_names[int(np.argwhere(~(np.isfinite(array) & (array >= 0)))[0, 0])]
                raise QuantDMError(f"search space: {name} of layer {layer!r} is negative or not finite")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        missing = set(self.layer_names) - {node.layer for node in self.graph.nodes if node.layer is not None}
        if missing:
            raise QuantDMError(f"search space: {len(missing)} layers are no nodes of the graph, e.g. {min(missing)!r}")

    @cached_property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the layers, in the order of the layer axis."""
        return tuple(layer.name for layer in self.layers)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Labels of the options, in the order of the option axis."""
        return tuple(option.label for option in self.options)

    @cached_property
    def places(self) -> dict[str | None, int]:
        """Label as configurations have it (None: a layer stays as it is) -> position on the option axis."""
        return {None if option == ORIGINAL else option.label: i for i, option in enumerate(self.options)}

    @cached_property
    def layer_index(self) -> dict[str, int]:
        """Layer name -> position on the layer axis."""
        return {name: index for index, name in enumerate(self.layer_names)}

    @cached_property
    def num_weights(self) -> NDArray[np.int64]:
        """Number of weights of every layer [L]."""
        return np.array([layer.num_weights for layer in self.layers], dtype=np.int64)

    @cached_property
    def felt_error(self) -> NDArray[np.float64]:
        """Noise errors for logarithms [L, O]: one of zero counts as 1/16 of its layer's least other, two bits more."""
        positive = np.where(self.noise_error > 0, self.noise_error, np.inf).min(axis=1, keepdims=True)
        return np.where(self.noise_error > 0, self.noise_error, np.where(np.isfinite(positive), positive / 16, 0.0))

    @cached_property
    def depth(self) -> NDArray[np.float64]:
        """Topological position of every layer [L], 0 (input) to 1 (output)."""
        position = {node.layer: node.depth for node in self.graph.nodes if node.layer is not None}
        return np.array([position[name] for name in self.layer_names])

    @cached_property
    def digest(self) -> str:
        """Content address: equal digests mean the same layers, options and bits."""
        return digest(self.layer_names, self.labels, self.bits.tolist())

    def check(self, choices: ArrayLike) -> NDArray[np.int64]:
        """Return choices as int64 [T, L] (one choice [L] becomes [1, L]).

        Raises:
            QuantDMError: wrong number of layers, or an option that does not exist.
        """
        choices = np.atleast_2d(np.asarray(choices))
        if choices.ndim != 2 or choices.shape[1] != len(self.layers):
            raise QuantDMError(
                f"choices: got shape {choices.shape}, expected [trials, {len(self.layers)} layers]; "
                "these trials belong to another model"
            )
        if not np.issubdtype(choices.dtype, np.integer):
            raise QuantDMError(f"choices: got {choices.dtype}, expected integers (positions on the option axis)")
        if choices.size and not (choices.min() >= 0 and choices.max() < len(self.options)):
            raise QuantDMError(
                f"choices: got options {choices.min()} to {choices.max()}, expected 0 to {len(self.options) - 1}"
            )
        return choices.astype(np.int64)

    def total_bits(self, choices: ArrayLike) -> NDArray[np.int64]:
        """Return the exact bits of every choice: [T, L] -> [T]."""
        return self.gather(self.bits, choices).sum(axis=1)

    def avg_bits(self, choices: ArrayLike) -> NDArray[np.float64]:
        """Return bits per quantizable weight, overhead included: [T, L] -> [T]."""
        return self.total_bits(choices) / self.num_weights.sum()

    def gather(self, table: NDArray[Any], choices: ArrayLike) -> NDArray[Any]:
        """Look every choice up in a table [L, O]: [T, L] -> [T, L]."""
        choices = self.check(choices)
        return table[np.arange(len(self.layers)), choices]

    def config(self, choice: ArrayLike) -> QuantConfig:
        """Turn one choice [L] into a config."""
        (row,) = self.check(choice)
        chosen = {name: self.options[o] for name, o in zip(self.layer_names, row, strict=True)}
        return QuantConfig({name: None if scheme == ORIGINAL else scheme for name, scheme in chosen.items()})

    def choice_of(self, config: QuantConfig) -> NDArray[np.int64]:
        """Turn a config into one choice [L].

        Raises:
            QuantDMError: the config has other layers, or a scheme that is not an option here.
        """
        unknown = [name for name in config if name not in self.layer_index]
        missing = [name for name in self.layer_names if name not in config]
        if unknown or missing:
            name = (unknown or missing)[0]
            raise QuantDMError(
                f"config: {len(unknown)} unknown and {len(missing)} missing layers, first {name!r}; "
                f"{nearest(name, self.layer_names)}"
            )
        labels = config.to_labels()
        for name in self.layer_names:
            if labels[name] not in self.places:
                raise QuantDMError(f"config: {name!r} is {config[name]}, which is no option; {', '.join(self.labels)}")
        return self.choices_of([labels])[0]

    def holds(self, labels: Mapping[str, str | None]) -> bool:
        """Tell whether a configuration, as labels, has these layers and no other options."""
        return labels.keys() == self.layer_index.keys() and self.places.keys() >= set(labels.values())

    def choices_of(self, configs: Sequence[Mapping[str, str | None]]) -> NDArray[np.int64]:
        """Turn configurations that the space holds, as labels, into choices [T, L]."""
        rows = [[self.places[labels[name]] for name in self.layer_names] for labels in configs]
        return np.array(rows, dtype=np.int64).reshape(-1, len(self.layers))

    def save(self, path: str | Path) -> None:
        """Write the space as one JSON record."""
        record = {
            "version": SPACE_VERSION,
            "layers": [asdict(layer) for layer in self.layers],
            "graph": self.graph.to_dict(),
            "options": list(self.labels),
            "bits": self.bits.tolist(),
            "weight_error": self.weight_error.tolist(),
            "noise_error": self.noise_error.tolist(),
        }
        write_json(path, record)

    @classmethod
    def load(cls, path: str | Path) -> "SearchSpace":
        """Read a space written by `save`.

        Raises:
            QuantDMError: missing, damaged or of another version.
        """
        record = read_json(path, version=SPACE_VERSION)
        try:
            return cls(
                layers=tuple(LayerRecord(**_tuples(layer)) for layer in record["layers"]),
                graph=Graph.from_dict(record["graph"]),
                options=tuple(parse_option(label) for label in record["options"]),
                bits=np.array(record["bits"], dtype=np.int64),
                weight_error=np.array(record["weight_error"]),
                noise_error=np.array(record["noise_error"]),
            )
        except (KeyError, TypeError) as error:
            raise QuantDMError(f"{path}: not a search space ({error}); run the bank stage again") from None


def _tuples(record: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
