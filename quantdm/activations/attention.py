"""Quantize what meets inside attention: queries, keys, values, and the probabilities of the softmax.

All of diffusers' attention ends in `scaled_dot_product_attention`; a torch function mode that is active while the
denoiser runs sees its operands where an integer kernel would round them, after norms and rotary embeddings. Attention
without softmax (linear attention) has no such product and is left alone.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from quantdm.activations.rounding import quantize_activations
from quantdm.recipe import ActivationScheme

SHIFT = 2.0**-8  # of shifted log2: probabilities far below it share one level


class QuantizedAttention(TorchFunctionMode):
    """While active, `scaled_dot_product_attention` works on quantized operands and probabilities."""

    def __init__(self, operands: ActivationScheme | None, probabilities: str | None) -> None:
        super().__init__()
        self.operands, self.probabilities = operands, probabilities

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the product of attention, leave every other function alone."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if self.operands is not None:
            # Heads of one token lie apart here, [B, H, T, d]: a token is a row of one head, as kernels have it.
            dims = {"tensor": tuple(range(query.dim())), "sample": tuple(range(1, query.dim()))}
            shared = dims.get(self.operands.granularity, -1)
            query, key, value = (quantize_activations(x, self.operands, dims=shared) for x in (query, key, value))
        if self.probabilities is None:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(above, -torch.inf)
        if attn_mask is not None:
            hidden = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if hidden else scores + attn_mask
        probabilities = F.dropout(scores.softmax(-1), dropout_p)
        return quantize_probabilities(probabilities, self.probabilities) @ value


def quantize_probabilities(p: Tensor, label: str) -> Tensor:
    """Round probabilities in [0, 1] to 2^bits levels; a new tensor of the same dtype, computed in float32.

    Args:
        p: any shape.
        label: `uniform-8` has equal steps; `log2-4` the powers 1, 1/2, ... 2^-(2^b - 1); `shiftedlog2-4` equal steps of
            log2(p + 2^-8) (shift-uniform-log2, I&S-ViT, arXiv 2311.10126).
    """
    method, bits = label.rsplit("-", 1)
    levels = 2 ** int(bits) - 1
    x = p.float()
    if method == "uniform":
        rounded = torch.round(x * levels) / levels
    elif method == "log2":
        rounded = torch.exp2(-torch.round(-torch.log2(x)).clamp(0, levels))
    else:
        low, high = math.log2(SHIFT), math.log2(1 + SHIFT)
        step = (high - low) / levels
        rounded = torch.exp2(torch.round((torch.log2(x + SHIFT) - low) / step) * step + low) - SHIFT
    return rounded.to(p.dtype)
