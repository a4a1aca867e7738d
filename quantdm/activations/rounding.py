"""Round activations to an integer grid (simulated quantization)."""

import torch

MIN_SCALE = torch.finfo(torch.float32).tiny


def fake_quantize(x: torch.Tensor, bits: int, dims: int | tuple[int, ...] = -1) -> torch.Tensor:
    """Round `x` to 2^bits levels between its minimum and maximum over `dims`, asymmetrically.

    Returns a new tensor of the same shape and dtype; computed in fp32. `dims=-1` is one range per token, `dims=(2, 3)`
    one per (sample, channel) map. Source: Qua2SeDiMo (arXiv 2412.14628), section 4.
    """
    with torch.no_grad():
        levels = 2**bits - 1
        y = x.float()
        low, high = y.amin(dims, keepdim=True), y.amax(dims, keepdim=True)
        # A constant token has no range; a step that keeps its zero point small returns it to within 2^-20.
        scale = torch.maximum((high - low) / levels, high.abs() * 2**-20).clamp_(min=MIN_SCALE)
        zero = torch.round(low / scale)  # -z: an integer, so that an integer GEMM can correct for it
        # x_hat = scale * clip(round(x / scale), -z, levels - z)
        y = torch.div(y, scale).round_()
        y = torch.clamp(y, zero, zero + levels, out=y).mul_(scale).to(x.dtype)
    # Straight-through: x - x.detach() is exactly zero and carries the gradient.
    return y + (x - x.detach()) if x.requires_grad and torch.is_grad_enabled() else y
