"""Fuse LoRAs into packed layers as branches beside the codes, and take them off again; no code is touched.

PEFT merges a LoRA by adding a dense matrix to a dense weight, and a packed layer has none to add to; rounded to codes
again, most of the LoRA would be lost. As a branch it stays the product that it is.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from torch import Tensor, nn

from quantdm.errors import QuantDMError
from quantdm.hub.header import layer_table
from quantdm.modules.packed import PackedLayer, packed_layers
from quantdm.quantizers import QuantizedWeight
from quantdm.quantizers.lora import fused, taken_off

Model = TypeVar("Model")


def fuse_lora(pipe_or_model: Model, *, lora_scale: float = 1.0) -> Model:
    """Fuse the active LoRAs of a pipeline (or model) into its packed layers, in place, and unload all adapters.

    A fused layer decodes to its weight plus the LoRA at its present strength (`set_adapters`) times `lora_scale`:
    outputs are those of the loaded adapter up to rounding. Factors are stored in fp16 if that holds them exactly, else
    in fp32, and the layer's label says so (`-lora-16`); `save_pretrained` keeps them.

    Returns:
        The same object.

    Raises:
        QuantDMError: no active LoRA on a packed layer, one on a layer that is not packed, or an adapter that is no
            plain LoRA of a Linear or ungrouped Conv layer. Nothing is changed then.
    """
    found = {
        id(model): (model, {name: _factors(name, module, lora_scale) for name, module in _wrapped(model)})
        for model in _models(pipe_or_model)
    }
    changes = [  # two text encoders have layers of the same names
        (_base(model, name), fused(_base(model, name).quantized, *factors))
        for model, layers in found.values()
        for name, factors in layers.items()
        if factors is not None
    ]
    if not changes:
        raise QuantDMError(
            f"fuse_lora: {type(pipe_or_model).__name__} has no active LoRA on packed layers; load_lora_weights first"
        )
    for layer, weight in changes:
        _set_(layer, weight)
    for model, layers in found.values():
        if layers:
            _unload_(model)
            _renew_table_(model)
    return pipe_or_model


def unfuse_lora(pipe_or_model: Model) -> Model:
    """Take the fused LoRAs off all packed layers of a pipeline (or model) again, in place: bit by bit what it was.

    Returns:
        The same object.

    Raises:
        QuantDMError: nothing is fused.
    """
    layers = [
        (model, layer)
        for model in _models(pipe_or_model)
        for layer in packed_layers(model).values()
        if layer.scheme.lora is not None
    ]
    if not layers:
        raise QuantDMError(f"unfuse_lora: no LoRA is fused into the {type(pipe_or_model).__name__}")
    for _, layer in layers:
        _set_(layer, taken_off(layer.quantized))
    for model in {id(model): model for model, _ in layers}.values():
        _renew_table_(model)
    return pipe_or_model


def _models(pipe_or_model: Any) -> list[nn.Module]:
    if isinstance(pipe_or_model, nn.Module):
        return [pipe_or_model]
    return [part for part in pipe_or_model.components.values() if isinstance(part, nn.Module)]


def _wrapped(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers that PEFT wrapped in adapters, which know `get_base_layer`."""
    yield from ((name, module) for name, module in model.named_modules() if hasattr(module, "get_base_layer"))


def _base(model: nn.Module, name: str) -> PackedLayer:
    layer: Any = model.get_submodule(name)
    return layer.get_base_layer()


def _factors(name: str, module: Any, scale: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return left [C, r], right [r, n] and the factors of pairs [r] of a layer's active LoRAs; None: it has none."""
    if not module.disable_adapters and module.active_adapters and not hasattr(module, "lora_A"):
        raise QuantDMError(f"{name}: its adapter ({type(module).__name__}) is no LoRA; unload it, or keep it un-fused")
    active = [] if module.disable_adapters else [key for key in module.active_adapters if key in _pairs(module)]
    if not active:
        return None
    base = module.get_base_layer()
    if not isinstance(base, PackedLayer):
        raise QuantDMError(
            f"{name}: has a LoRA and is not packed; give it a scheme, or leave it out of the LoRA's target modules"
        )
    plain = not any(getattr(module, "use_dora", {}).get(key) or module.lora_bias.get(key) for key in active)
    if not plain or getattr(base, "groups", 1) > 1 or isinstance(base, nn.Embedding):
        raise QuantDMError(
            f"{name}: its adapter is no plain LoRA of a Linear or ungrouped Conv layer (DoRA, with a bias, or of an "
            "embedding table); keep it un-fused"
        )
    left = [module.lora_B[key].weight.detach().flatten(1) for key in active]
    right = [module.lora_A[key].weight.detach().flatten(1) for key in active]
    steps = [torch.full((len(b),), module.scaling[key] * scale) for key, b in zip(active, right, strict=True)]
    return torch.cat(left, dim=1), torch.cat(right), torch.cat(steps).to(right[0].device)


def _pairs(module: Any) -> set[str]:
    kinds = ("lora_A", "lora_embedding_A")
    return {key for kind in kinds for key in getattr(module, kind, {})}


def _set_(layer: PackedLayer, weight: QuantizedWeight) -> None:
    """Let a layer hold another weight of its shape, in the place and the residency that it has."""
    path, residency = layer.path, layer.residency
    layer.pack_(weight, layer.weight_dtype, layer.packed.device)
    layer.path = path
    layer.keep_(residency)


def _unload_(model: Any) -> None:
    """Take the wrappers of PEFT off, and what says that they are there."""
    recurse_remove_peft_layers(model)
    if hasattr(model, "peft_config"):
        del model.peft_config
    model._hf_peft_config_loaded = False


def _renew_table_(model: Any) -> None:
    """Tell the model's quantizer, which saves it, what its layers hold now."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        # an adapter on top has its own names for the layers below it
        quantizer.table = {name.removesuffix(".base_layer"): entry for name, entry in layer_table(model).items()}
