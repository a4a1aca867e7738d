"""LoRAs beside a quantized weight: put there, and taken off again, without a look at its codes."""

from dataclasses import replace

import torch
from torch import Tensor

from quantdm.quantizers.branches import LORA
from quantdm.quantizers.weight import QuantizedWeight


def fused(weight: QuantizedWeight, left: Tensor, right: Tensor, step: Tensor) -> QuantizedWeight:
    """Return a weight with a LoRA beside what it has: W_hat + left·diag(step)·right.

    Factors are brought below 2^15 by powers of two, which go into their steps, and stored in fp16 if that holds those
    of all LoRAs exactly, else in fp32.

    Args:
        weight: of shape [C, ...] with n weights per row.
        left: [C, r].
        right: [r, n].
        step: [r].
    """
    scheme, tensors = weight.scheme, weight.tensors
    powers = [_power(left.float(), 0), _power(right.float(), 1)]
    parts = [left.float() / powers[0], right.float() / powers[1][:, None]]
    step = step.float() * powers[0] * powers[1]
    if scheme.lora is not None:
        parts = [
            torch.cat([tensors["lora_left"].float(), parts[0]], dim=1),
            torch.cat([tensors["lora_right"].float(), parts[1]]),
        ]
        step = torch.cat([tensors["lora_step"], step])
    wide = not all(torch.equal(part.half().float(), part) for part in parts)
    kept = [part if wide else part.half() for part in parts]
    scheme = scheme.model_copy(update={"lora": len(step), "wide": wide})
    own = {"lora_left": kept[0], "lora_right": kept[1], "lora_step": step}
    return replace(weight, scheme=scheme, tensors={**tensors, **own})


def taken_off(weight: QuantizedWeight) -> QuantizedWeight:
    """Return a weight without its LoRAs."""
    scheme = weight.scheme.model_copy(update={"lora": None, "wide": False})
    return replace(
        weight, scheme=scheme, tensors={k: v for k, v in weight.tensors.items() if not k.startswith(f"{LORA}_")}
    )


def _power(factor: Tensor, dim: int) -> Tensor:
    """Return powers of two 2^k with the largest of every pair below 2^(k+15)."""
    _, exponent = torch.frexp(factor.abs().amax(dim=dim))
    return torch.exp2((exponent - 15).clamp(-100, 100).float())
