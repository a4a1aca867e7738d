"""The integer products that this machine has: oneDNN's and `torch._int_mm`, each asked for a known result first."""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

CENTRE = 128  # uint8 codes are int8 ones above it
_log = logging.getLogger("quantdm")


@cache
def linear_operator(device_type: str) -> str | None:
    """Return the product of rows to use on a kind of device: "onednn", "int_mm", or None."""
    candidates: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"int_mm": int_mm_of}
    if device_type == "cpu":
        candidates = {"onednn": _onednn_linear, **candidates}
    for name, product in candidates.items():
        if _is_right(product, device_type):
            return name
    _log.warning("%s: no integer product that is right here; activations stay simulated", device_type)
    return None


@cache
def conv_operator(device_type: str) -> str | None:
    """Return the integer convolution to use on a kind of device: "onednn", or None."""
    if device_type == "cpu" and _is_right(_onednn_conv, device_type):
        return "onednn"
    _log.warning("%s: no integer convolution that is right here; those layers stay simulated", device_type)
    return None


def int_mm_of(codes: Tensor, weight: Tensor) -> Tensor:
    """Return (codes - 128) @ weight.T as int32 [M, N] by `torch._int_mm`.

    CUDA wants more than 16 rows, multiples of 8 elsewhere, and a column-major second factor; what is missing is filled
    up with zeros, the weight beforehand by `aligned`.

    Args:
        codes: uint8 [M, K].
        weight: int8 [N, K], or both rounded up to multiples of 8.
    """
    signed = torch.bitwise_xor(codes.view(torch.int8), -CENTRE)  # flipping the highest bit subtracts 128
    rows, length = signed.shape
    extra = (0, weight.shape[1] - length, 0, max(17 - rows, 0))
    if any(extra):
        signed = torch.nn.functional.pad(signed, extra)
    return torch._int_mm(signed, weight.t())[:rows]


def aligned(weight: Tensor) -> Tensor:
    """Return int8 [N, K] with both rounded up to multiples of 8 by zeros."""
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % 8, 0, -weight.shape[0] % 8))


def _onednn_linear(codes: Tensor, weight: Tensor) -> Tensor:
    packed, (one, none) = torch.ops.onednn.qlinear_prepack(weight, None), _unscaled(len(weight))
    product = torch.ops.onednn.qlinear_pointwise
    return product(codes, 1.0, CENTRE, packed, one, none, None, 1.0, 0, torch.float32, "none", [], "")


def _onednn_conv(codes: Tensor, weight: Tensor) -> Tensor:
    """The same product as a convolution of pixels."""
    image, kernel = codes.t()[None, :, :, None].contiguous(), weight[:, :, None, None]
    one, none = _unscaled(len(weight))
    packed = torch.ops.onednn.qconv_prepack(kernel, one, 1.0, 1, [1, 1], [0, 0], [1, 1], 1, None)
    places = ([1, 1], [0, 0], [1, 1], 1)
    product = torch.ops.onednn.qconv2d_pointwise
    y = product(image, 1.0, CENTRE, packed, one, none, None, *places, 1.0, 0, torch.float32, "none", [], "")
    return y[0, :, :, 0].t()


def _unscaled(rows: int) -> tuple[Tensor, Tensor]:
    return torch.ones(rows), torch.zeros(rows, dtype=torch.int64)


def _is_right(product: Callable[[Tensor, Tensor], Tensor], device_type: str) -> bool:
    """Whether a product exists and is right for the largest codes: without VNNI, pairs of products may saturate."""
    codes = torch.arange(32 * 64).remainder(256).view(32, 64).to(torch.uint8)
    codes[:2], codes[2] = 255, 0
    weight = torch.arange(16 * 64).mul(7).remainder(256).sub(128).view(16, 64).to(torch.int8)
    weight[0], weight[1] = 127, -128
    expected = (codes.long() - CENTRE) @ weight.long().t()
    try:
        found = product(codes.to(device_type), weight.to(device_type)).cpu()
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.equal(found.long(), expected)
