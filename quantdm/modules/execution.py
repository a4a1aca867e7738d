"""Which packed layers multiply integers, and why others do not."""

import logging
from functools import cache
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from quantdm.modules.coded import CodedInput
from quantdm.modules.int8 import Int8Weight
from quantdm.modules.operators import conv_operator, linear_operator
from quantdm.modules.products import ConvProduct, Geometry, LinearProduct
from quantdm.quantizers import QuantizedWeight
from quantdm.quantizers.branches import factors_of

LONGEST = 2**16  # of a row: the sums of its products with codes stay below 2^31
Product = LinearProduct | ConvProduct


class Multiplies(Protocol):
    """What a product needs of a packed layer."""

    bias: torch.Tensor | None

    @property
    def quantized(self) -> QuantizedWeight:
        """What is stored of its weight."""
        ...


_log = logging.getLogger("quantdm")


def obstacle_of(layer: nn.Module, form: Int8Weight | None, split: int | None, device: torch.device) -> str | None:
    """Say why a layer cannot multiply its int8 weight with coded inputs; None: it can.

    Asks the machine for its operators only where the weight allows a product.
    """
    if form is None:
        return "its weight has no int8 form"
    if not getattr(layer, "takes_codes", False):
        return "there is no integer product for its kind of layer"
    if any(part.groups > 1 for part in form.parts) or len(form.parts) != (1 if split is None else 2):
        return "its weight has a scale for every group, which no integer product can factor out"
    if form.codes.shape[1] > LONGEST:
        return f"its rows have more than {LONGEST} weights"
    if isinstance(layer, nn.Conv2d):
        if layer.groups > 1 and layer.scheme.branch_rank:  # type: ignore[union-attr]
            return "it is grouped, and has a branch through all groups"
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return "its padding is not one of zeros by a number"
        return None if conv_operator(device.type) else f"{device.type} has no integer convolution"
    return None if linear_operator(device.type) else f"{device.type} has no integer product"


@torch.inference_mode(False)
@torch.no_grad()
def new_product(layer: nn.Module, form: Int8Weight) -> Product:
    """Prepare the product of a layer without an obstacle; the weight is copied into the operator's own order."""
    if isinstance(layer, nn.Conv2d):
        shape = (len(form.codes), form.codes.shape[1], *layer.kernel_size)
        assert not isinstance(layer.padding, str)
        return ConvProduct(form, shape, Geometry(layer.stride, layer.padding, layer.dilation, layer.groups))
    operator = linear_operator(form.codes.device.type)
    assert operator is not None
    return LinearProduct(form, operator)


def product_of(layer: Multiplies, product: Product, coded: CodedInput) -> torch.Tensor:
    """Return the output of a layer for an input in integers: their product, and what its branches add to it."""
    found, stored = product(coded, layer.bias), layer.quantized
    if not stored.scheme.branch_rank:
        return found
    x = coded.values().to(found.dtype)
    for left, right in factors_of(stored.scheme, stored.tensors):
        left, right = left.to(x.dtype), right.to(x.dtype)
        if isinstance(layer, nn.Conv2d):
            thin = layer._conv_forward(x, right.view(len(right), *stored.shape[1:]), None)
            found = found + F.conv2d(thin, left[:, :, None, None])
        else:
            found = found + F.linear(F.linear(x, right), left)
    return found


@cache
def say_once(reason: str) -> None:
    """Log why inputs stay simulated, once in a process for every reason."""
    _log.warning("activations stay simulated: %s", reason)
