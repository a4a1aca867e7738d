"""Put packed layers in the places of torch layers, and back."""

from functools import cache

import torch
from torch import nn

from quantdm.errors import QuantDMError
from quantdm.modules.lookup import answer_for_weights_
from quantdm.modules.packed import PackedLayer, QuantConv1d, QuantConv2d, QuantConv3d, QuantLinear, torch_class
from quantdm.modules.table import QuantEmbedding
from quantdm.quantizers import QuantizedWeight

PACKED_CLASSES: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.Embedding: QuantEmbedding,
}


@cache
def packed_class(base: type[nn.Module]) -> type[PackedLayer]:
    if base in PACKED_CLASSES:
        return PACKED_CLASSES[base]
    if not issubclass(base, tuple(PACKED_CLASSES)):
        raise QuantDMError(f"layer: got {base.__name__}, expected nn.Linear, nn.Conv1d/2d/3d or nn.Embedding")
    # A subclass with its own forward keeps it; there `self.weight` decodes itself inside any torch function.
    return type(f"Quant{base.__name__}", (PackedLayer, base), {})


def check_replaceable(layer: nn.Module, name: str) -> None:
    """Check that replacing a layer loses nothing that others attached to it.

    Raises:
        QuantDMError: the layer carries hooks.
    """
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
        raise QuantDMError(
            f"{name}: carries hooks (activation quantization, offload, layerwise casting); remove them, add them later"
        )


def new_packed_layer(layer: nn.Module) -> PackedLayer:
    """Return a packed layer with the bias, the geometry and the mode of `layer`, still without its bytes."""
    cls = packed_class(type(layer))
    packed = cls.__new__(cls)
    nn.Module.__init__(packed)
    own = packed.__dict__.keys()
    packed.__dict__.update({key: value for key, value in layer.__dict__.items() if key not in own})
    packed.keep_("packed")
    packed.training = layer.training
    if "bias" in layer._parameters:
        packed._parameters["bias"] = layer._parameters["bias"]
    return packed


def set_layer_(denoiser: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` at the dotted path `name`."""
    if isinstance(layer, PackedLayer):
        layer.path = name
        answer_for_weights_(denoiser)
    parent, _, child = name.rpartition(".")
    denoiser.get_submodule(parent)._modules[child] = layer


def quantize_module_(parent: nn.Module, name: str, quantized: QuantizedWeight) -> PackedLayer:
    """Replace the layer at the dotted path `name` by one that holds `quantized`.

    Raises:
        QuantDMError: not a Linear or Conv layer, already packed, another shape, or the layer carries hooks.
    """
    layer = parent.get_submodule(name)
    if isinstance(layer, PackedLayer):
        raise QuantDMError(f"{name}: is already quantized ({layer.scheme}); dequantize() it first")
    check_replaceable(layer, name)
    packed = new_packed_layer(layer)
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    if tuple(weight.shape) != tuple(quantized.shape):
        raise QuantDMError(f"{name}: got codes for shape {tuple(quantized.shape)}, expected {tuple(weight.shape)}")
    packed.pack_(quantized, weight.dtype, weight.device)
    set_layer_(parent, name, packed)
    return packed


def dequantize_module_(parent: nn.Module, name: str) -> nn.Module:
    """Replace the packed layer at `name` by the torch layer with the decoded weight."""
    packed = parent.get_submodule(name)
    if not isinstance(packed, PackedLayer):
        raise QuantDMError(f"{name}: got {type(packed).__name__}, expected a packed layer")
    base = torch_class(type(packed))
    layer = base.__new__(base)
    nn.Module.__init__(layer)
    described = layer.__dict__.keys() | PackedLayer.__annotations__.keys()
    layer.__dict__.update({key: value for key, value in packed.__dict__.items() if key not in described})
    layer.training = packed.training
    layer._parameters.update({"weight": nn.Parameter(packed.dequantize()), **packed._parameters})
    del layer._parameters["packed"]
    set_layer_(parent, name, layer)
    return layer
