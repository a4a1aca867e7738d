"""Weights beside the layers that a search chooses for: embedding tables, and the parts that are no denoisers."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from quantdm.bank.pointed import pointed
from quantdm.hub.planned import part_rules
from quantdm.hub.quantize import model_layers
from quantdm.pipelines.loading import DiffusionPipeline
from quantdm.pipelines.subject import Subject
from quantdm.quantizers import QuantizedWeight, quantize_weight
from quantdm.recipe.joint import joint_prefix
from quantdm.schemes import Scheme


class OtherWeights:
    """The weights of text encoders, VAE and whatever else is no denoiser, each part under one scheme.

    Args:
        pipe: the full-precision pipeline, in the dtype in which it was opened. Of every part the last scheme is kept.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self._pipe = pipe
        self._found: dict[str, tuple[str, dict[str, QuantizedWeight]]] = {}

    @contextmanager
    def applied(self, pipe: DiffusionPipeline, parts: Mapping[str, str] | None) -> Iterator[None]:
        """Let parts of a pipeline have the weights of their labels while the context is open; None: they stay."""
        with ExitStack() as stack:
            for name, label in (parts or {}).items():
                weights = self._under(name, label)  # before the part has others
                point = stack.enter_context(pointed(pipe.components[name]))
                for layer, weight in weights.items():
                    point(f"{layer}.weight", partial(_decoded, weight))
            yield

    def labels(self, parts: Mapping[str, str] | None) -> dict[str, str]:
        """Return `PART:layer` -> label of every layer that is quantized, as an export's headers have it."""
        found = {}
        for name, label in (parts or {}).items():
            for layer, scheme in _schemes(name, self._pipe.components[name], label).items():
                found[joint_prefix(name, 1) + layer] = scheme.label
        return found

    def _under(self, name: str, label: str) -> dict[str, QuantizedWeight]:
        kept, weights = self._found.get(name, (None, {}))
        if kept != label:
            model = self._pipe.components[name]
            splits = {layer.name: layer.split for layer in model_layers(model)}
            weights = {
                layer: quantize_weight(
                    model.get_parameter(f"{layer}.weight").detach(), scheme, split=splits[layer], name=layer
                )
                for layer, scheme in _schemes(name, model, label).items()
            }
            self._found[name] = label, weights
        return weights


class Tables:
    """The embedding tables of a subject, quantized when they are asked for: that needs no calibration and no bank."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._found: dict[tuple[str, str], QuantizedWeight] = {}

    def of(self, labels: str | Mapping[str, str]) -> dict[str, QuantizedWeight]:
        """Return joint name -> table under a scheme, or under its own."""
        if isinstance(labels, str):
            labels = {table.name: labels for table in self._subject.tables}
        return {name: self._under(name, label) for name, label in labels.items()}

    def _under(self, name: str, label: str) -> QuantizedWeight:
        if (name, label) not in self._found:
            weight = self._subject.weights.get_parameter(f"{name}.weight")
            self._found[name, label] = quantize_weight(weight, Scheme.parse(label), name=name)
        return self._found[name, label]


def _schemes(name: str, model: nn.Module, label: str) -> dict[str, Scheme]:
    """Return the schemes of the layers that a part's rules quantize."""
    found = part_rules(name, model, Scheme.parse(label)).resolve(model_layers(model))
    return {layer: scheme for layer, scheme in found.items() if scheme is not None}


def _decoded(stored: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return stored.dequantize(dtype=dtype).to(device)
