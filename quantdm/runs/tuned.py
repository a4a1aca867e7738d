"""Tuned weights on disk: the packed weights of one recipe and the biases and norms that were trained with them."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from quantdm.bank.pointed import pointed
from quantdm.errors import QuantDMError
from quantdm.files import load_tensors, save_tensors
from quantdm.quantizers import QuantizedWeight
from quantdm.schemes import Scheme

TUNED_VERSION = 1
TUNED_FILE = "tuned.safetensors"


class TunedWeights:
    """The weights of one configuration under joint names, and other parameters; a bank of one option per layer."""

    def __init__(self, weights: Mapping[str, QuantizedWeight], others: Mapping[str, Tensor]) -> None:
        self.weights, self.others = dict(weights), dict(others)

    @property
    def labels(self) -> dict[str, str]:
        """Layer name -> label of its scheme."""
        return {name: weight.scheme.label for name, weight in self.weights.items()}

    def get(self, layer_name: str, scheme: Scheme) -> QuantizedWeight:
        """Return one layer's weight.

        Raises:
            QuantDMError: it was tuned under another scheme, or not at all.
        """
        found = self.weights.get(layer_name)
        if found is None or found.scheme != scheme:
            what = "not there" if found is None else f"tuned as {found.scheme}"
            raise QuantDMError(f"tuned weights: {layer_name} is {what}, expected {scheme}; tune this recipe anew")
        return found

    def other(self, parameter_name: str) -> Tensor | None:
        """Return what a bias or norm was trained to; None: it was not."""
        return self.others.get(parameter_name)

    def differing(self, labels: Mapping[str, str | None]) -> list[str]:
        """Return the layers that a configuration gives another scheme than they have here, in order of their names."""
        wanted = {name: label for name, label in labels.items() if label is not None}
        return sorted(n for n in wanted.keys() | self.labels.keys() if wanted.get(n) != self.labels.get(n))

    def check(self, labels: Mapping[str, str | None]) -> None:
        """Check that these are the weights of a configuration.

        Raises:
            QuantDMError: a layer has another scheme.
        """
        names = self.differing(labels)
        if names:
            raise QuantDMError(
                f"tuned weights: belong to another recipe ({len(names)} layers differ, first {names[0]}); tune it anew"
            )

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        tensors = {f"weight/{name}/{key}": t for name, w in self.weights.items() for key, t in w.tensors.items()}
        tensors |= {f"other/{name}": value for name, value in self.others.items()}
        layers = {
            name: {
                "scheme": weight.scheme.label,
                "shape": list(weight.shape),
                "split": weight.split,
                "dtype": str(weight.dtype).removeprefix("torch."),
            }
            for name, weight in self.weights.items()
        }
        save_tensors(path, tensors, {"version": TUNED_VERSION, "layers": layers})

    @classmethod
    def load(cls, path: str | Path) -> "TunedWeights":
        """Read what `save` wrote, memory-mapped.

        Raises:
            QuantDMError: missing or damaged.
        """
        tensors, metadata = load_tensors(path)
        found: dict[str, dict[str, Tensor]] = {name: {} for name in metadata["layers"]}
        for key, value in tensors.items():
            if key.startswith("weight/"):
                name, _, own = key.removeprefix("weight/").rpartition("/")
                found[name][own] = value
        weights = {
            name: QuantizedWeight.from_tensors(
                Scheme.parse(layer["scheme"]),
                layer["shape"],
                layer["split"],
                getattr(torch, layer["dtype"]),
                found[name],
            )
            for name, layer in metadata["layers"].items()
        }
        others = {key.removeprefix("other/"): v for key, v in tensors.items() if key.startswith("other/")}
        return cls(weights, others)

    @contextmanager
    def applied(self, denoiser: nn.Module, *, room: float = math.inf) -> Iterator[nn.Module]:
        """Give the denoiser the tuned parameters while the context is open; of `room`, see `pointed`."""
        with pointed(denoiser, room=room) as point:
            for name, weight in self.weights.items():
                point(f"{name}.weight", lambda dtype, device, w=weight: w.to(device).dequantize(dtype=dtype))
            for name, value in self.others.items():
                point(name, lambda dtype, device, v=value: v.to(device, dtype))
            yield denoiser
