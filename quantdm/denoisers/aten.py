"""What aten operations do to the data flow: products, norms, combinations, and where a dimension goes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# aten operations by what they do to the graph; operand positions of (x, weight) for the contractions.
PRODUCTS = {
    "mm": (0, 1), "bmm": (0, 1), "matmul": (0, 1), "linear": (0, 1), "dot": (0, 1), "mv": (0, 1),
    "addmm": (1, 2), "baddbmm": (1, 2), "addbmm": (1, 2),
    "convolution": (0, 1), "conv1d": (0, 1), "conv2d": (0, 1), "conv3d": (0, 1),
}  # fmt: skip
NORMS = {"native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit", "_fused_rms_norm"}
NORMS |= {"layer_norm", "group_norm", "batch_norm", "rms_norm", "_native_batch_norm_legit_no_training"}
COMBINES = {
    "add": "add",
    "sub": "add",
    "mul": "mul",
    "div": "mul",
    "cat": "concat",
    "stack": "concat",
    "addcmul": "mul",
}
# Resizing and padding keep the channels where they are; so do the copies and norms.
KEEPS_DIMS = NORMS | {"clone", "_to_copy", "detach", "alias", "contiguous", "dropout", "native_dropout", "expand"}
KEEPS_DIMS |= {"constant_pad_nd", "avg_pool1d", "avg_pool2d", "avg_pool3d", "slice", "_softmax", "lift_fresh"}
KEEPS_DIMS |= {"upsample_nearest1d", "upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d"}
RESHAPES = {"view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "_reshape_alias", "flatten"}


def carried_dim(name: str, func: Any, args: tuple[Any, ...], tensor: Tensor, dim: int, out: Tensor) -> int | None:
    """Return the dimension of `out` that holds dimension `dim` of `tensor` unchanged, or None."""
    if torch.Tag.pointwise in func.tags or name in KEEPS_DIMS:
        return dim + out.dim() - tensor.dim()
    if name in RESHAPES:  # the same number of elements before it and the same size: the same dimension
        before = numel(tensor.shape[:dim])
        fits = (d for d in range(out.dim()) if numel(out.shape[:d]) == before and out.shape[d] == tensor.shape[dim])
        return next(fits, None)
    if name == "permute":
        return [d % tensor.dim() for d in args[1]].index(dim)
    if name in ("transpose", "t"):
        a, b = (d % tensor.dim() for d in (args[1:3] if name == "transpose" else (0, -1)))
        return {a: b, b: a}.get(dim, dim)
    return None


def numel(shape: Iterable[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
