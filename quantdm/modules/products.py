"""Products of coded inputs with int8 weights, in integers; scales, zero points and the bias come afterwards.

With x_hat = s·(q + z) and w_hat = (c + o)·t, of one row of each,
    sum x_hat·w_hat = s·t·(sum (q - 128)·c + (z + 128)·sum c + o·sum (q + z)),
where the first sum is the integer product, the second belongs to the weight, and the third occurs only where a row has
an offset o. A scale s of a whole sample goes into oneDNN's operator, which then does all of it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from quantdm.modules.coded import CodedInput, Codes
from quantdm.modules.int8 import Int8Weight
from quantdm.modules.kernels import Kernel
from quantdm.modules.operators import CENTRE, aligned, int_mm_of

ACC = 2**20  # elements of a product that is finished before the next: what is still to be finished stays in the cache
MOST = 2**31  # int32 sums stay below it


class _Half(NamedTuple):
    """What multiplies one half of an input: int8 [N, n], float32 [N] scales t, sums t·sum c, offsets t·o."""

    codes: Tensor
    scale: Tensor
    sums: Tensor
    offsets: Tensor | None


class Geometry(NamedTuple):
    """How a 2D convolution moves over its input."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def halves_of(form: Int8Weight) -> Iterator[_Half]:
    """Yield what multiplies every half of an input; a form whose rows have one scale for each."""
    for part in form.parts:
        codes = form.codes[:, part.columns].contiguous()
        scale = part.scale.flatten().expand(len(codes)).contiguous()
        sums = codes.sum(1, dtype=torch.int64).double().mul_(scale).float()
        offsets = None if part.offset is None else part.offset.flatten().expand(len(codes)) * scale
        yield _Half(codes, scale, sums, offsets)


class LinearProduct:
    """y = x_hat @ w_hat.T + bias for inputs coded row by row, or as a whole."""

    def __init__(self, form: Int8Weight, operator: str) -> None:
        self._halves = tuple(_Rows(half, operator) for half in halves_of(form))

    @property
    def nbytes(self) -> int:
        """Bytes of the weight in the operator's order, with its scales and sums."""
        return sum(half.nbytes for half in self._halves)

    def fits(self, coded: CodedInput) -> bool:
        """Whether the integer sums of this input cannot overflow: sums of codes alone never do."""
        return True

    def __call__(self, coded: CodedInput, bias: Tensor | None) -> Tensor:
        """Return [..., N] of the input's dtype."""
        added = None if bias is None else bias.float()
        *first, last = zip(self._halves, coded.parts, strict=True)
        for half, part in first:
            added = half(part, added, torch.float32)
        half, part = last
        return half(part, added, coded.dtype)


class _Rows:
    def __init__(self, half: _Half, operator: str) -> None:
        self._n, self._scale, self._sums, self._offsets = half.codes.shape[1], half.scale, half.sums, half.offsets
        self._onednn = operator == "onednn"
        self._packed = torch.ops.onednn.qlinear_prepack(half.codes, None) if self._onednn else aligned(half.codes)
        self._none = torch.zeros(len(half.codes), dtype=torch.int64)
        self.nbytes = _bytes_of(half) + self._none.nbytes

    def __call__(self, part: Codes, added: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return s·(…) + added; `added` is [N] or [..., N]."""
        codes = part.codes.reshape(-1, self._n)
        shape = (*part.codes.shape[:-1], len(self._scale))
        if self._is_whole(part, added):
            product = torch.ops.onednn.qlinear_pointwise
            scale, zero = part.scale.item(), int(part.zero)
            wide = torch.float32 if dtype == torch.float16 else dtype
            y = product(codes, scale, -zero, self._packed, self._scale, self._none, added, 1.0, 0, wide, "none", [], "")
            return y.to(dtype).view(shape)
        scale, zero = (t.expand(*part.codes.shape[:-1], 1).reshape(-1, 1) for t in (part.scale, part.zero))
        tokens = None if self._offsets is None else codes.sum(1, True, dtype=torch.int32).float() + self._n * zero
        added = None if added is None else added.reshape(-1, len(self._scale))
        out = torch.empty(len(codes), len(self._scale), dtype=dtype, device=codes.device)
        step = max(ACC // len(self._scale), 32)
        for first in range(0, len(codes), step):
            lines = slice(first, first + step)
            acc = self._accumulate(codes[lines])
            rows = (acc, scale[lines], zero[lines], tokens if tokens is None else tokens[lines])
            there = added if added is None or len(added) == 1 else added[lines]
            finish((out[lines],), *rows, there, self._sums, self._offsets, self._weight_scale, per_row=5)
        return out.view(shape)

    def _is_whole(self, part: Codes, added: Tensor | None) -> bool:
        """Whether one scale and one zero point serve all rows, as oneDNN's operator takes them."""
        if not self._onednn or self._offsets is not None or part.scale.numel() > 1:
            return False
        return (added is None or added.dim() == 1) and no_overflow(part, self._n)

    @property
    def _weight_scale(self) -> Tensor | None:
        return None if self._onednn else self._scale

    def _accumulate(self, codes: Tensor) -> Tensor:
        """Return sum (q - 128)·c: int32, or float32 and times t."""
        if not self._onednn:
            return int_mm_of(codes, self._packed)[:, : len(self._scale)]
        product = torch.ops.onednn.qlinear_pointwise
        rest = (self._packed, self._scale, self._none, None, 1.0, 0, torch.float32, "none", [], "")
        return product(codes, 1.0, CENTRE, *rest)


class ConvProduct:
    """y = conv2d(x_hat, w_hat) + bias for inputs coded sample by sample, or as a whole; by oneDNN."""

    def __init__(self, form: Int8Weight, shape: tuple[int, ...], geometry: Geometry) -> None:
        self._kernels = tuple(_Kernel(half, shape, geometry) for half in halves_of(form))
        self._pixels = LinearProduct(form, "onednn") if shape[2:] == (1, 1) and geometry.groups == 1 else None
        self._stride = geometry.stride

    @property
    def nbytes(self) -> int:
        """Bytes of the weight in the operator's order, with its scales."""
        return sum(kernel.nbytes for kernel in self._kernels) + (self._pixels.nbytes if self._pixels else 0)

    def fits(self, coded: CodedInput) -> bool:
        """Whether the integer sums of this input cannot overflow."""
        return self._by_pixel(coded) or all(
            no_overflow(part, kernel.n) for part, kernel in zip(coded.parts, self._kernels, strict=True)
        )

    def __call__(self, coded: CodedInput, bias: Tensor | None) -> Tensor:
        """Return [B, N, H', W'] of the input's dtype, in channels-last memory."""
        if self._by_pixel(coded):
            assert self._pixels is not None
            rows = tuple(self._rows(part) for part in coded.parts)
            return self._pixels(CodedInput(rows, coded.dtype, -1), bias).permute(0, 3, 1, 2)
        added = None if bias is None else bias.float()
        single = len(coded.parts) == 1
        dtype = coded.dtype if single else torch.float32
        y, *rest = (
            kernel(part, None if number else added, dtype)
            for number, (kernel, part) in enumerate(zip(self._kernels, coded.parts, strict=True))
        )
        for other in rest:
            y += other
        return y.to(coded.dtype)

    def _by_pixel(self, coded: CodedInput) -> bool:
        return coded.parts[0].scale.shape[2:].numel() > 1

    def _rows(self, part: Codes) -> Codes:
        """Return the pixels that a 1x1 kernel meets as rows, [B, H', W', C]."""
        down, right = self._stride
        codes, scale, zero = (t[:, :, ::down, ::right].permute(0, 2, 3, 1) for t in (part.codes, part.scale, part.zero))
        return Codes(codes, scale, zero)


class _Kernel:
    def __init__(self, half: _Half, shape: tuple[int, ...], geometry: Geometry) -> None:
        self._scale, self._offsets, self._geometry = half.scale, half.offsets, geometry
        self.n, self.nbytes = half.codes.shape[1], _bytes_of(half)
        kernel = half.codes.view(shape[0], -1, *shape[2:])
        self._packed = self._prepacked(kernel, half.scale)
        self._ones = None
        if half.offsets is not None:  # sums of the input under the kernel, one channel per group
            one = torch.ones_like(kernel[: geometry.groups])
            self._ones = self._prepacked(one, torch.ones(geometry.groups))

    def _prepacked(self, kernel: Tensor, scale: Tensor) -> Tensor:
        places = [list(part) for part in self._geometry[:3]]
        return torch.ops.onednn.qconv_prepack(kernel, scale, 1.0, 1, *places, self._geometry.groups, None)

    def __call__(self, part: Codes, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        scales, zeros = part.scale.flatten().tolist(), part.zero.flatten().tolist()
        samples = part.codes.split(len(part.codes) // len(scales))
        outputs = [self._of(q, s, z, bias, dtype) for q, s, z in zip(samples, scales, zeros, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _of(self, codes: Tensor, scale: float, zero: float, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        if self._ones is None:
            wide = torch.float32 if dtype == torch.float16 else dtype
            return self._run(codes, scale, zero, self._packed, self._scale, bias, wide).to(dtype)
        assert self._offsets is not None
        y = self._run(codes, scale, zero, self._packed, self._scale, bias, torch.float32)
        sums = self._run(codes, scale, zero, self._ones, torch.ones(self._geometry.groups), None, torch.float32)
        sums = sums.repeat_interleave(len(self._offsets) // self._geometry.groups, dim=1)
        return y.addcmul_(sums, self._offsets[:, None, None]).to(dtype)

    def _run(
        self,
        codes: Tensor,
        scale: float,
        zero: float,
        packed: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        places, none = [list(part) for part in self._geometry[:3]], torch.zeros(len(weight_scale), dtype=torch.int64)
        product = torch.ops.onednn.qconv2d_pointwise
        start = (codes, scale, -int(zero), packed, weight_scale, none, bias)
        return product(*start, *places, self._geometry.groups, 1.0, 0, dtype, "none", [], "")


def _bytes_of(half: _Half) -> int:
    return sum(tensor.nbytes for tensor in half if tensor is not None)


def no_overflow(part: Codes, n: int) -> bool:
    """Whether sums of n products with codes shifted by the zero point stay below 2^31."""
    return bool((255 + part.zero.abs().max()) * CENTRE * n < MOST)


def _finish(
    out: tuple[Tensor],
    acc: Tensor,
    scale: Tensor,
    zero: Tensor,
    tokens: Tensor | None,
    added: Tensor | None,
    sums: Tensor,
    offsets: Tensor | None,
    weight_scale: Tensor | None,
) -> None:
    """Write scale·(acc·weight_scale + (zero + 128)·sums + tokens·offsets) + added."""
    y = acc if weight_scale is None else acc * weight_scale
    y = torch.addcmul(y, zero + CENTRE, sums)
    if offsets is not None:
        y = torch.addcmul(y, tokens, offsets)  # type: ignore[arg-type]
    out[0].copy_(y * scale if added is None else torch.addcmul(added, y, scale))


finish = Kernel(_finish)
