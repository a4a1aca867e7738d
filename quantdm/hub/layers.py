"""Quantize the layers of a model all at once or not at all."""

from typing import Protocol

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from quantdm.denoisers.layers import LayerRecord, list_layers
from quantdm.errors import QuantDMError
from quantdm.modules.layers import (
    PACKED_CLASSES,
    PackedLayer,
    check_replaceable,
    dequantize_module_,
    packed_layers,
    quantize_module_,
)
from quantdm.quantizers import QuantizedWeight, quantize_weight
from quantdm.recipe import check_layers
from quantdm.schemes import QuantConfig, Scheme


class Bank(Protocol):
    """Where weights quantized before can be taken from."""

    def get(self, layer_name: str, scheme: Scheme) -> QuantizedWeight:
        """Return the layer's weight under this scheme."""
        ...


def seams(model: nn.Module) -> dict[str, int | None]:
    """Return the quantizable layers of a model: name -> input channel where a concatenated input is split, or None.

    Text encoders have no long skips: there, every Linear and Conv layer is one.
    """
    if isinstance(model, PreTrainedModel):
        return {n: None for n, m in model.named_modules() if isinstance(m, tuple(PACKED_CLASSES))}
    records: tuple[LayerRecord, ...] = list_layers(model)
    return {record.name: record.split for record in records}


def quantize_layers_(model: nn.Module, config: QuantConfig, *, bank: Bank | None = None, what: str = "recipe") -> None:
    """Quantize every layer that has a scheme and put packed layers in their places.

    Raises:
        QuantDMError: the config is for another model, the model is quantized already, its weights are not loaded,
            contain NaN, or its layers carry hooks. The model is unchanged then.
    """
    splits = seams(model)
    check_layers(config, splits, what=what)
    done = packed_layers(model)
    if done:
        raise QuantDMError(
            f"{type(model).__name__} is already quantized ({len(done)} layers); dequantize() it or load the original"
        )
    names = [name for name in splits if config[name] is not None]
    for name in names:
        layer = model.get_submodule(name)
        check_replaceable(layer, name)
        if layer.weight.is_meta:  # type: ignore[union-attr]
            raise QuantDMError(f"{name}: its weight is not loaded (meta device); load the checkpoint first")
    quantized: dict[str, QuantizedWeight] = {}
    for name in tqdm(names, desc="quantize", unit="layer", delay=2, leave=False):
        scheme = config[name]
        assert scheme is not None
        if bank is not None:
            quantized[name] = bank.get(name, scheme)
            found = quantized[name]
            if (found.scheme, found.split) != (scheme, splits[name]):
                raise QuantDMError(f"{name}: the bank gave {found.scheme} split at {found.split}, expected {scheme}")
        else:
            weight: torch.Tensor = model.get_submodule(name).weight.detach()  # type: ignore[union-attr,operator]
            quantized[name] = quantize_weight(weight, scheme, split=splits[name], name=name)
        shape = tuple(model.get_submodule(name).weight.shape)  # type: ignore[union-attr,arg-type]
        if tuple(quantized[name].shape) != shape:
            raise QuantDMError(f"{name}: the bank has the shape {tuple(quantized[name].shape)}, expected {shape}")
    for name in names:
        quantize_module_(model, name, quantized[name])


def dequantize_layers_(model: nn.Module) -> None:
    """Put torch layers with the decoded weights back in the places of packed layers."""
    layers: dict[str, PackedLayer] = packed_layers(model)
    for name, layer in layers.items():
        check_replaceable(layer, name)
    for name in layers:
        dequantize_module_(model, name)
