"""Turn an input into the integers of its grid, for layers that multiply them; q, k and v share those of one tensor."""

import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantdm.activations.rounding import Dims, grid_of, range_of, turned
from quantdm.modules.coded import CodedInput, Codes
from quantdm.modules.kernels import Kernel
from quantdm.quantizers.equaliser import powers_of
from quantdm.recipe import ActivationScheme

Given = tuple[float, float] | None


class Grid(NamedTuple):
    """Which values of an input share a scale."""

    dims: Dims  # the dimensions that do
    channel: int  # -1, or 1 for the input of a convolution
    split: int | None  # the channel at which a long skip begins, whose halves have scales of their own
    given: Given  # the range of a static scheme
    exponents: Tensor | None = None  # of the powers of two that an equalised scheme divides channels by


class _Last(NamedTuple):
    source: "weakref.ref[Tensor]"
    key: object
    coded: CodedInput


class _Memory(threading.local):
    last: _Last | None = None


_memory = _Memory()


def code_input(x: Tensor, scheme: ActivationScheme, grid: Grid) -> CodedInput:
    """Return the integers to which `quantize_activations` would round an input: the same grid, the same ties.

    The last result is kept as long as its tensor lives unchanged: the next layer that reads that tensor in the same way
    gets it.

    Args:
        x: [..., C] or [B, C, H, W].
        scheme: without outliers, which are on a grid of their own.
        grid: what shares a scale.
    """
    # Inference tensors do not count their changes; an equaliser belongs to one layer.
    if x.is_inference() or grid.exponents is not None:
        return new_codes(x, scheme, grid)
    last, key = _memory.last, (x._version, scheme, grid)
    if last and last.source() is x and last.key == key:
        return last.coded
    coded = new_codes(x, scheme, grid)
    _memory.last = _Last(weakref.ref(x, _forget), key, coded)
    return coded


def new_codes(x: Tensor, scheme: ActivationScheme, grid: Grid) -> CodedInput:
    """Return what `code_input` does, always made anew."""
    parts: Sequence[Tensor] = (x,)
    powers: Sequence[Tensor | None] = (None,)
    if grid.exponents is not None:
        powers = (powers_of(grid.exponents.to(x.device), x.shape[grid.channel], -1),)
    if grid.split is not None:
        parts = x.tensor_split([grid.split], dim=grid.channel)
        powers = (None, None) if powers[0] is None else powers[0].tensor_split([grid.split])
    parts = [turned(part, scheme, grid.channel, None) for part in parts] if scheme.hadamard else parts
    coded = tuple(_code(part, scheme, grid, own) for part, own in zip(parts, powers, strict=True))
    return CodedInput(coded, x.dtype, grid.channel, scheme.hadamard, grid.exponents)


def _forget(source: "weakref.ref[Tensor]") -> None:
    if _memory.last and _memory.last.source is source:
        _memory.last = None


def _code(x: Tensor, scheme: ActivationScheme, grid: Grid, powers: Tensor | None) -> Codes:
    """Code one part, its channels multiplied by `powers`: channels last, as rows of pixels or tokens."""
    if grid.channel == 1:
        last = grid._replace(dims=_channels_last(grid.dims, x.dim()), channel=-1)
        coded = _code(x.permute(0, 2, 3, 1), scheme, last, powers)
        return Codes(*(t.permute(0, 3, 1, 2) for t in (coded.codes, coded.scale, coded.zero)))
    x, levels, given = x.contiguous(), 2**scheme.bits - 1, grid.given
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    rows, coded_rows, shape = x.flatten(0, -2), codes.flatten(0, -2), (*x.shape[:-1], 1)
    if grid.dims in (-1, (x.dim() - 1,)) and scheme.range is None and given is None:
        scale, zero = (torch.empty(len(rows), 1, device=x.device) for _ in range(2))
        _code_tokens((coded_rows, scale, zero), rows, powers, levels, scheme.symmetric, per_row=1)
        return Codes(codes, scale.view(shape), zero.view(shape))
    if given is None:
        low, high = _range(x if powers is None else x * powers, scheme, grid.dims)
    else:
        low, high = torch.tensor(given, device=x.device)
    scale, zero = grid_of(low, high, levels, scheme.symmetric)
    if scale.numel() == 1:
        scale, zero = (t.view([1] * x.dim()) for t in (scale, zero))
        lines = scale.view(1, 1), zero.view(1, 1)
    else:
        lines = (t.expand(shape).reshape(-1, 1) for t in (scale, zero))
    _place((coded_rows,), rows, *lines, powers, levels, per_row=3)
    return Codes(codes, scale, zero)


def _range(x: Tensor, scheme: ActivationScheme, dims: Dims) -> tuple[Tensor, Tensor]:
    """Return minima and maxima in the dtype of the input: taking them is exact."""
    low, high = range_of(x if scheme.range is None else x.float(), scheme, dims)
    return low.float(), high.float()


def _channels_last(dims: Dims, ndim: int) -> Dims:
    """Return where dimensions of [B, C, H, W] are in [B, H, W, C]."""
    order = [0, *range(2, ndim), 1]
    return tuple(order.index(dim % ndim) for dim in ((dims,) if isinstance(dims, int) else dims))


def _tokens_on_grid(
    out: tuple[Tensor, Tensor, Tensor], x: Tensor, powers: Tensor | None, levels: int, symmetric: bool
) -> None:
    x = x.float() if powers is None else x * powers
    scale, zero = grid_of(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), levels, symmetric)
    for place, value in zip(out, (_placed(x, scale, zero, levels), scale, zero), strict=True):
        place.copy_(value)


def _on_given_grid(
    out: tuple[Tensor], x: Tensor, scale: Tensor, zero: Tensor, powers: Tensor | None, levels: int
) -> None:
    out[0].copy_(_placed(x.float() if powers is None else x * powers, scale, zero, levels))


def _placed(x: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    return torch.div(x, scale).round_().sub_(zero).clamp_(0, levels)


_code_tokens, _place = Kernel(_tokens_on_grid), Kernel(_on_given_grid)
