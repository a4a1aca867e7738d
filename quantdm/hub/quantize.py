"""Quantize the layers of a model all at once or not at all."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from quantdm.denoisers.inventory import LayerRecord, list_layers
from quantdm.denoisers.names import op_type_of, weights_below
from quantdm.denoisers.tables import TableRecord, list_tables
from quantdm.denoisers.weights import weight_specs
from quantdm.errors import QuantDMError, counted
from quantdm.hub.header import LayerEntry
from quantdm.hub.side_by_side import Task, quantize_tasks
from quantdm.hub.ties import untie_packed_
from quantdm.modules.packed import PackedLayer, packed_layers
from quantdm.modules.swap import check_replaceable, dequantize_module_, quantize_module_
from quantdm.quantizers import Moments, QuantizedWeight, count_bits
from quantdm.quantizers.branches import check_rank
from quantdm.quantizers.options import SWEEPS
from quantdm.recipe import check_layers, is_table
from quantdm.schemes import ORIGINAL_BITS, QuantConfig, Scheme


class Bank(Protocol):
    """Where weights quantized before can be taken from."""

    def get(self, layer_name: str, scheme: Scheme) -> QuantizedWeight:
        """Return the layer's weight under this scheme."""
        ...

    def other(self, parameter_name: str) -> torch.Tensor | None:
        """Return what a parameter that is not quantized becomes; None: it stays."""
        ...


@dataclass(frozen=True)
class PlainLayer:
    """One Linear or Conv of a model that is not traced."""

    name: str
    op_type: str
    shape: tuple[int, ...]
    split: None = None

    @property
    def num_weights(self) -> int:
        """Weights of the layer, without its bias."""
        return math.prod(self.shape)


AnyLayer = LayerRecord | PlainLayer | TableRecord


def model_layers(model: nn.Module) -> Sequence[AnyLayer]:
    """Return the quantizable layers of a denoiser, VAE or text encoder: Linear and Conv layers, then embedding tables.

    Text encoders have no long skips and are not traced: there, every Linear and Conv layer is one.
    """
    if not isinstance(model, PreTrainedModel):
        return [*list_layers(model), *list_tables(model)]
    specs = weight_specs(model)
    below = weights_below(spec.name for spec in specs)
    plain = [PlainLayer(spec.name, op_type_of(spec.name, below), spec.shape) for spec in specs]
    return [*plain, *list_tables(model)]


def check_fits(config: QuantConfig, layers: Sequence[AnyLayer], *, what: str) -> None:
    """Check that a config covers the Linear and Conv layers of a model, and that its tables can take their schemes.

    Raises:
        QuantDMError: names the first layers that differ, a table with a calibrated scheme, or a branch of a higher rank
            than a layer has.
    """
    tables = [layer.name for layer in layers if is_table(layer)]
    check_layers(config, [layer.name for layer in layers if not is_table(layer)], tables=tables, what=what)
    for layer in layers:
        if (own := config.get(layer.name)) is not None:
            check_rank(layer.shape, own, layer.name)
    for name in tables:
        scheme = config.get(name)
        if scheme is not None and scheme.calibration is not None:
            raise QuantDMError(
                f"{name}: {scheme} is calibrated on the inputs of a layer, and an embedding table has none; "
                "choose a scheme without calibration"
            )


def stored_bits(layer: AnyLayer, scheme: Scheme | None) -> int:
    """Return the exact bits of a layer's weight; an unquantized one counts ORIGINAL_BITS a weight."""
    if scheme is None:
        return layer.num_weights * ORIGINAL_BITS
    return count_bits(layer.shape, scheme, layer.split)


def average_bits(layers: Sequence[AnyLayer], config: QuantConfig) -> float:
    """Return the bits per Linear and Conv weight of a config, overhead included; unquantized ones have ORIGINAL_BITS.

    Embedding tables are not counted, as nobody counts them; their bytes are.
    """
    layers = [layer for layer in layers if not is_table(layer)]
    bits = sum(stored_bits(layer, config[layer.name]) for layer in layers)
    return bits / sum(layer.num_weights for layer in layers)


def quantize_layers_(model: nn.Module, config: QuantConfig, *, bank: Bank | None = None, what: str = "recipe") -> None:
    """Quantize every layer that has a scheme and put packed layers in their places.

    Raises:
        QuantDMError: the config is for another model, the model is quantized already, its weights are not loaded,
            contain NaN, or its layers carry hooks. The model is unchanged then.
    """
    set_packed_(model, pack_layers(model, config, bank=bank, what=what))


def pack_layers(
    model: nn.Module,
    config: QuantConfig,
    *,
    bank: Bank | None = None,
    moments: Mapping[str, Moments] = MappingProxyType({}),
    sweeps: int = SWEEPS,
    what: str = "recipe",
) -> dict[str, QuantizedWeight]:
    """Return the packed weight of every layer that has a scheme; the model stays as it is.

    Args:
        model: in full precision.
        config: the scheme of every layer.
        bank: has weights that are quantized already.
        moments: of the layers that have a calibrated scheme; asked for in the order of the layers.
        sweeps: as in `quantize_weight`.
        what: how errors call the config.

    Raises:
        QuantDMError: as `quantize_layers_`.
    """
    layers = model_layers(model)
    splits = {layer.name: layer.split for layer in layers}
    check_fits(config, layers, what=what)
    done = packed_layers(model)
    if done:
        raise QuantDMError(
            f"{type(model).__name__} is already quantized ({counted(len(done), 'layer')}); dequantize() it or load the "
            "original"
        )
    names = [name for name in splits if config.get(name) is not None]
    tables = {layer.name for layer in layers if is_table(layer)}  # which no bank has: they need no inputs
    for name in names:
        layer = model.get_submodule(name)
        check_replaceable(layer, name)
        if layer.weight.is_meta:  # type: ignore[union-attr]
            raise QuantDMError(f"{name}: its weight is not loaded (meta device); load the checkpoint first")
    tasks = [
        Task(name, model.get_parameter(f"{name}.weight").detach(), scheme, splits[name])
        for name in names
        if (scheme := config[name]) is not None
    ]
    stored: dict[str, QuantizedWeight] = {}
    for task in tasks:
        if bank is not None and task.name not in tables:
            entry = LayerEntry(task.scheme, tuple(task.weight.shape), task.split, task.weight.dtype)
            stored[task.name] = stored_in(bank, task.name, entry)
    left = [task for task in tasks if task.name not in stored]
    with tqdm(total=len(left), desc="quantize", unit="layer", delay=2, leave=False) as bar:
        made = quantize_tasks(left, moments, sweeps, progress=bar.update)
    both = stored | made
    return {name: both[name] for name in names}


def stored_in(bank: Bank, name: str, entry: LayerEntry) -> QuantizedWeight:
    """Return what a bank has of a layer, decoded to the dtype of `entry`, whatever weights the bank is made of.

    Raises:
        QuantDMError: it is of another scheme, shape or split.
    """
    found = replace(bank.get(name, entry.scheme), dtype=entry.dtype)
    if (found.scheme, found.split, tuple(found.shape)) != (entry.scheme, entry.split, entry.shape):
        raise QuantDMError(
            f"{name}: the bank gave {found.scheme} of {tuple(found.shape)} split at {found.split}, "
            f"expected {entry.scheme} of {entry.shape} split at {entry.split}"
        )
    return found


def set_packed_(model: nn.Module, quantized: Mapping[str, QuantizedWeight], bank: Bank | None = None) -> None:
    """Put packed layers in the places of those that `pack_layers` packed, and what else the bank has for the model."""
    for name, weight in quantized.items():
        quantize_module_(model, name, weight)
    for name, parameter in model.named_parameters():
        value = None if bank is None else bank.other(name)
        if value is not None:
            parameter.data = value.to(parameter.device, parameter.dtype)
    if isinstance(model, PreTrainedModel):
        untie_packed_(model)


def dequantize_layers_(model: nn.Module) -> None:
    """Put torch layers with the decoded weights back in the places of packed layers."""
    layers: dict[str, PackedLayer] = packed_layers(model)
    for name, layer in layers.items():
        check_replaceable(layer, name)
    for name in layers:
        dequantize_module_(model, name)
