"""Layers that run with packed weights, and activation quantization."""

from quantdm.modules.activations import (
    KEEP_8BIT,
    activation_spec,
    default_keep_8bit,
    fake_quantize,
    layer_bits,
    set_activation_bits_,
)
from quantdm.modules.layers import (
    RESIDENCIES,
    PackedLayer,
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantLinear,
    Residency,
    dequantize_module_,
    packed_layers,
    quantize_module_,
)
from quantdm.modules.residency import dense_weights, set_residency

__all__ = [
    "KEEP_8BIT",
    "RESIDENCIES",
    "PackedLayer",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantLinear",
    "Residency",
    "activation_spec",
    "default_keep_8bit",
    "dense_weights",
    "dequantize_module_",
    "fake_quantize",
    "layer_bits",
    "packed_layers",
    "quantize_module_",
    "set_activation_bits_",
    "set_residency",
]
