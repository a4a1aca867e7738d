"""Decoding as seen by torch.compile: one opaque node a layer, where decoding in place of it would break the graph."""

import itertools
import weakref
from typing import Protocol

import torch

from quantdm.errors import QuantDMError
from quantdm.modules.blob import split_blob
from quantdm.quantizers import QuantizedWeight
from quantdm.schemes import Scheme


class Decodes(Protocol):
    """What knows its dense weight."""

    def dequantize(self, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Decode the weight into a new tensor."""
        ...


_layers: "weakref.WeakValueDictionary[int, Decodes]" = weakref.WeakValueDictionary()
_numbers = itertools.count()


def new_handle(layer: Decodes) -> torch.Tensor:
    """Return a number under which `decode_layer` finds the layer as long as it lives, int64 []."""
    number = next(_numbers)
    _layers[number] = layer
    with torch.inference_mode(False):  # an inference tensor is another input to a compiled graph than an ordinary one
        return torch.tensor(number, device="cpu")


@torch.library.custom_op("quantdm::decode_layer", mutates_args=())
def decode_layer(handle: torch.Tensor, shape: list[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Decode the weight of the layer with this handle.

    Neither the scheme nor the number of bytes is in the graph, so blocks of equal shapes share one whatever their
    schemes are: torch compiles a block a few times only before it gives up.
    """
    weight = _layers[int(handle)].dequantize(dtype=dtype)
    if weight.device != device:
        raise QuantDMError(f"packed layer: its bytes are on {weight.device}, its input on {device}; move the model")
    return weight


@decode_layer.register_fake
def _(handle: torch.Tensor, shape: list[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@torch.library.custom_op("quantdm::decode", mutates_args=())
def decode_bytes(
    packed: torch.Tensor, label: str, shape: list[int], split: int | None, original: torch.dtype, dtype: torch.dtype
) -> torch.Tensor:
    """Decode a blob; an exported program holds the bytes and what they mean, as it outlives the layer."""
    scheme = Scheme.parse(label)
    tensors = split_blob(packed, tuple(shape), scheme, split)
    return QuantizedWeight(scheme, tuple(shape), split, original, tensors).dequantize(dtype=dtype)


@decode_bytes.register_fake
def _(
    packed: torch.Tensor, label: str, shape: list[int], split: int | None, original: torch.dtype, dtype: torch.dtype
) -> torch.Tensor:
    return packed.new_empty(shape, dtype=dtype)
