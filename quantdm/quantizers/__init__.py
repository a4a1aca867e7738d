"""Pure tensor mathematics: uniform, k-means and log2 quantizers, and how their codes are packed. Never sees a model."""

from quantdm.quantizers.moments import Moments
from quantdm.quantizers.options import quantize_options, quantize_weight
from quantdm.quantizers.packing import pack_codes, packed_size, unpack_codes
from quantdm.quantizers.weight import (
    QuantizedWeight,
    count_bits,
    stored_tensors,
    weight_error,
)

__all__ = [
    "Moments",
    "QuantizedWeight",
    "count_bits",
    "pack_codes",
    "packed_size",
    "quantize_options",
    "quantize_weight",
    "stored_tensors",
    "unpack_codes",
    "weight_error",
]
