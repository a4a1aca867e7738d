"""Round activations to an integer grid (simulated quantization)."""

import torch
from torch import Tensor

from quantdm.quantizers.equaliser import shifted
from quantdm.quantizers.hadamard import rotate
from quantdm.recipe import ActivationScheme

MIN_SCALE = torch.finfo(torch.float32).tiny
OUTLIERS = 64  # one channel of so many, at least one, counts as an outlier channel
TAIL = 1e-3  # of the values lie outside a percentile range at either end
SHRUNK = tuple(1 - step / 20 for step in range(11))  # parts of the full range among which the least error is sought
Dims = int | tuple[int, ...]


def quantize_activations(
    x: Tensor,
    scheme: ActivationScheme,
    *,
    dims: Dims = -1,
    channel: int = -1,
    given: tuple[float, float] | None = None,
    exponents: Tensor | None = None,
) -> Tensor:
    """Round an input as a scheme says; a new tensor of the same shape and dtype, computed in float32.

    Args:
        x: any shape.
        scheme: `hadamard` rotates along `channel`, rounds and rotates back, as an integer product of rotated weights
            would; `outliers` takes the largest channels apart.
        dims: the dimensions that share a scale, see `shared_dims`.
        channel: the dimension of the channels.
        given: the range (low, high) of a static scheme.
        exponents: of the powers of two that an equalised scheme divides the channels by, int8 [C].

    The gradient passes straight through. Source: Qua2SeDiMo section 4 (dynamic min-max), LLM.int8 (arXiv 2208.07339:
    outlier channels apart), QuaRot (rotation), SmoothQuant (arXiv 2211.10438: equalisation).
    """
    with torch.no_grad():
        y = turned(x, scheme, channel, exponents)
        rounded = _round(y, scheme, dims, given) if scheme.outliers is None else _apart(y, scheme, dims, channel)
        rounded = rotate(rounded, channel) if scheme.hadamard else rounded
        rounded = shifted(rounded, exponents, channel, 1) if exponents is not None else rounded
        rounded = rounded.to(x.dtype)
    # Straight-through: x - x.detach() is exactly zero and carries the gradient.
    return rounded + (x - x.detach()) if x.requires_grad and torch.is_grad_enabled() else rounded


def turned(
    x: Tensor, scheme: ActivationScheme, channel: int, exponents: Tensor | None, seam: int | None = None
) -> Tensor:
    """Return an input in float32 and in the coordinates that a scheme rounds in: as it is, rotated or equalised."""
    if exponents is not None:
        return shifted(x, exponents, channel, -1).float()
    return rotate(x.float(), channel, seam=seam) if scheme.hadamard else x.float()


def range_of(x: Tensor, scheme: ActivationScheme, dims: Dims) -> tuple[Tensor, Tensor]:
    """Return the range [low, high] that a scheme gives to every group of values that shares a scale (kept dims)."""
    if scheme.range == "percentile":
        low, high = _percentiles(x, dims)
    else:
        low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    if scheme.range != "mse":
        return low, high
    best = torch.full_like(low, torch.inf)
    found = low, high
    for part in SHRUNK:
        error = (_on_grid(x, part * low, part * high, scheme) - x).square_().sum(dims, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        found = torch.where(better, part * low, found[0]), torch.where(better, part * high, found[1])
    return found


def _round(x: Tensor, scheme: ActivationScheme, dims: Dims, given: tuple[float, float] | None) -> Tensor:
    low, high = range_of(x, scheme, dims) if given is None else (x.new_tensor(end) for end in given)
    return _on_grid(x, low, high, scheme)


def grid_of(low: Tensor, high: Tensor, levels: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the step, and which multiple of it is the lowest of the levels + 1 that cover [low, high] best."""
    if symmetric:
        largest = torch.maximum(low.abs(), high.abs())
        scale = (largest / (levels // 2)).clamp(min=MIN_SCALE)
        return scale, torch.full_like(scale, -(levels // 2 + 1))
    # A constant token has no range; a step that keeps its zero point small returns it to within 2^-20.
    scale = torch.maximum((high - low) / levels, high.abs() * 2**-20).clamp_(min=MIN_SCALE)
    return scale, torch.round(low / scale)  # whole steps, so that an integer product can correct for them


def _on_grid(x: Tensor, low: Tensor, high: Tensor, scheme: ActivationScheme) -> Tensor:
    """Round to the 2^bits multiples of a step that cover [low, high] best; what lies outside is clipped."""
    levels = 2**scheme.bits - 1
    scale, zero = grid_of(low, high, levels, scheme.symmetric)
    # x_hat = scale * clip(round(x / scale), z, z + levels)
    y = torch.div(x, scale).round_()
    return y.clamp_(min=zero).clamp_(max=zero + levels).mul_(scale)  # a sixth of the time of both bounds in one call


def _apart(x: Tensor, scheme: ActivationScheme, dims: Dims, channel: int) -> Tensor:
    """Round the largest channels of the call by themselves: two products whose results are added."""
    others = tuple(dim for dim in range(x.dim()) if dim != channel % x.dim())
    count = max(x.shape[channel] // OUTLIERS, 1)
    large = torch.zeros(x.shape[channel], dtype=torch.bool, device=x.device)
    large[x.abs().amax(others).topk(count).indices] = True
    mask = large.view([-1 if dim == channel % x.dim() else 1 for dim in range(x.dim())])
    plain = _round(x.masked_fill(mask, 0.0), scheme, dims, None)
    if scheme.outliers == 16:
        return torch.where(mask, x, plain)
    wide = scheme.model_copy(update={"bits": 8})
    return torch.where(mask, _round(x.masked_fill(~mask, 0.0), wide, dims, None), plain)


def _percentiles(x: Tensor, dims: Dims) -> tuple[Tensor, Tensor]:
    """Return the values below and above which the TAIL of every group lies."""
    dims = (dims,) if isinstance(dims, int) else dims
    dims = tuple(dim % x.dim() for dim in dims)
    kept = [dim for dim in range(x.dim()) if dim not in dims]
    flat = x.permute(*kept, *dims).flatten(len(kept))
    shape = [1 if dim in dims else x.shape[dim] for dim in range(x.dim())]
    last = flat.shape[-1]
    tail = int(TAIL * last)
    low, high = flat.kthvalue(tail + 1, -1).values, flat.kthvalue(last - tail, -1).values
    return low.view(shape), high.view(shape)
