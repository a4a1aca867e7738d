"""Layers that run with packed weights, and the form in which they keep them in memory."""

from quantdm.modules.packed import (
    RESIDENCIES,
    PackedLayer,
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantLinear,
    Residency,
    packed_layers,
)
from quantdm.modules.residency import dense_weights, set_residency
from quantdm.modules.swap import dequantize_module_, quantize_module_
from quantdm.modules.table import QuantEmbedding

__all__ = [
    "RESIDENCIES",
    "PackedLayer",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantEmbedding",
    "QuantLinear",
    "Residency",
    "dense_weights",
    "dequantize_module_",
    "packed_layers",
    "quantize_module_",
    "set_residency",
]
