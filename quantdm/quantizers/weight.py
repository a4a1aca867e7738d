"""One quantized weight: quantize it, count its bits, decode it.

A weight [C_out, C_in/groups, *kernel] is flattened per output channel. With `split` (the input channel of the seam of a
long-skip concatenation) its two halves along dim 1 take a quantizer each, and stored names end in ".0" and ".1".
Every quantizer stores packed codes, fp16 scales, int8 or fp16 codebooks, and one fp32 `factor`, a power of two: the
weight divided by it lies below 2^15, so scales and codebooks are normal fp16 numbers at any size, and the division is
exact.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantdm.errors import QuantDMError
from quantdm.quantizers import kmeans, log2, uniform
from quantdm.quantizers.packing import pack_codes, packed_size, unpack_codes
from quantdm.quantizers.rows import pieces, row_blocks, row_layout
from quantdm.quantizers.tables import gather_, nearest_codes, round_codebook
from quantdm.schemes import Scheme

ERROR_CHUNK = 2**20


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """The stored form of one weight; `tensors` holds everything that is kept, see `stored_tensors`."""

    scheme: Scheme
    shape: tuple[int, ...]
    split: int | None
    dtype: torch.dtype
    tensors: dict[str, Tensor]

    @classmethod
    def from_tensors(
        cls, scheme: Scheme, shape: Sequence[int], split: int | None, dtype: torch.dtype, tensors: dict[str, Tensor]
    ) -> "QuantizedWeight":
        """Build a weight from stored tensors.

        Raises:
            QuantDMError: names, shapes or dtypes are not those that `stored_tensors` states.
        """
        expected = stored_tensors(shape, scheme, split)
        if tensors.keys() != expected.keys():
            raise QuantDMError(f"stored weight {scheme}: got tensors {sorted(tensors)}, expected {sorted(expected)}")
        for name, (size, kind) in expected.items():
            if tuple(tensors[name].shape) != size or tensors[name].dtype != kind:
                got = f"{tensors[name].dtype} {tuple(tensors[name].shape)}"
                raise QuantDMError(f"stored weight {scheme}: {name} is {got}, expected {kind} {size}")
        return cls(scheme, tuple(shape), split, dtype, dict(tensors))

    @property
    def num_bits(self) -> int:
        """Bits of codes and overhead, exact; the padding of the codes to whole bytes is not counted."""
        return count_bits(self.shape, self.scheme, self.split)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def dequantize(self, *, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """Decode the weight: float32 arithmetic, one cast; the same values on every call.

        `dtype` defaults to the original one; values are kept within the range of the original dtype. With `out`
        [self.shape] the weight is written there, in the dtype of `out`.

        Raises:
            QuantDMError: `out` has another shape, or another dtype than the one asked for.
        """
        if out is None:
            device = next(iter(self.tensors.values())).device
            out = torch.empty(self.shape, dtype=dtype or self.dtype, device=device)
        elif tuple(out.shape) != self.shape or (dtype is not None and out.dtype != dtype):
            expected = f"{dtype or 'any dtype'} {self.shape}"
            raise QuantDMError(f"out: got {out.dtype} {tuple(out.shape)}, expected {expected}")
        target = out if out.is_contiguous() else torch.empty(self.shape, dtype=out.dtype, device=out.device)
        matrix = target.view(self.shape[0], -1)
        limit = min(torch.finfo(self.dtype).max, torch.finfo(torch.float32).max)
        for suffix, columns in _halves(self.shape, self.split):
            tensors = {name: self.tensors[name + suffix] for name in _parameters(self.scheme)}
            _decode_half_(matrix[:, columns], self.scheme, tensors, limit)
        return out if target is out else out.copy_(target)


def quantize_weight(
    weight: Tensor, scheme: Scheme, *, split: int | None = None, name: str = "weight"
) -> QuantizedWeight:
    """Quantize one weight [C_out, C_in/groups, *kernel] of any float dtype.

    `split` is the input channel at which a long-skip concatenation is seamed; `name` appears in errors.

    Raises:
        QuantDMError: NaN or infinite weights, not a float tensor of two or more dimensions, or `split` outside dim 1.
    """
    return quantize_options(weight, (scheme,), split=split, name=name)[0]


def quantize_options(
    weight: Tensor, schemes: Sequence[Scheme], *, split: int | None = None, name: str = "weight"
) -> list[QuantizedWeight]:
    """Quantize one weight under every scheme, in their order; bit-widths of one granularity share the sorted rows.

    Raises:
        QuantDMError: as `quantize_weight`.
    """
    matrix = _check_weight(weight, split, name)
    shape = tuple(weight.shape)
    stored: list[dict[str, Tensor]] = [{} for _ in schemes]
    for suffix, columns in _halves(shape, split):
        half = matrix[:, columns]
        factor = _factor(half)
        half = half.mul(1 / factor).contiguous()  # exact: the factor is a power of two
        for granularity, size in dict.fromkeys((s.granularity, s.group_size) for s in schemes):
            same = [i for i, s in enumerate(schemes) if (s.granularity, s.group_size) == (granularity, size)]
            blocks = [b.reshape(-1, b.shape[2]).contiguous() for b in row_blocks(half, schemes[same[0]])]
            is_kmeans = any(schemes[i].method == "kmeans" for i in same)
            sorted_blocks = [kmeans.sort_rows(rows) for rows in blocks] if is_kmeans else []
            for i in same:
                parameters = _fit(schemes[i], blocks, sorted_blocks, half.shape)
                parameters["factor"] = torch.tensor([factor], dtype=torch.float32, device=weight.device)
                stored[i] |= {key + suffix: parameters[key] for key in _parameters(schemes[i])}
    return [QuantizedWeight(s, shape, split, weight.dtype, t) for s, t in zip(schemes, stored, strict=True)]


def stored_tensors(
    shape: Sequence[int], scheme: Scheme, split: int | None = None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return name -> (shape, dtype) of what is stored for a weight of this shape.

    "codes" is flat uint8; "scale" fp16 and "zero_point" int16 are [lines, groups], "factor" fp32 is [1]; "codebook" is
    [lines, groups, k] with k = min(2^bits, weights per row), int8 (times "scale") or fp16 as the scheme's `table` says;
    see rows.py for lines and groups.
    """
    stored = {}
    for suffix, columns in _halves(tuple(shape), split):
        count = shape[0] * (columns.stop - columns.start)
        lines, groups, length = row_layout(shape[0], columns.stop - columns.start, scheme)
        sizes = {
            "codes": ((packed_size(count, scheme.bits),), torch.uint8),
            "scale": ((lines, groups), torch.float16),
            "zero_point": ((lines, groups), torch.int16),
            "codebook": ((lines, groups, min(2**scheme.bits, length)), _TABLE_DTYPE[scheme.table or "fp16"]),
            "factor": ((1,), torch.float32),
        }
        stored |= {key + suffix: sizes[key] for key in _parameters(scheme)}
    return stored


def count_bits(shape: Sequence[int], scheme: Scheme, split: int | None = None) -> int:
    """Return the exact bits of a weight of this shape: codes N·b and what every row has.

    A row has a scale of 16 bits, uniform a zero point of 16 more, k-means a codebook of 8·k (int8 table; an fp16 table
    takes 16·k and no scale). The 32 bits of each quantizer's factor are counted, padding is not.
    """
    overhead = sum(
        math.prod(size) * dtype.itemsize * 8
        for key, (size, dtype) in stored_tensors(shape, scheme, split).items()
        if not key.startswith("codes")
    )
    return math.prod(shape) * scheme.bits + overhead


def weight_error(weight: Tensor, dequantized: Tensor, p: float = uniform.ERROR_POWER) -> float:
    """Return mean|w - w_hat|^p / mean|w|^p, the error that is comparable between methods and layers.

    Raises:
        QuantDMError: the shapes differ.
    """
    if weight.shape != dequantized.shape:
        raise QuantDMError(
            f"weight_error: got shapes {tuple(weight.shape)} and {tuple(dequantized.shape)}, expected one"
        )
    w, w_hat = weight.detach().reshape(-1), dequantized.detach().reshape(-1)
    inverse = 1 / _factor(w)  # powers of tiny weights must not underflow
    error = size = 0.0
    for _, part in pieces(1, w.numel(), ERROR_CHUNK):
        piece = w[part].float()
        error += float(uniform.power_sum((piece - w_hat[part].float()).mul_(inverse), p))
        size += float(uniform.power_sum(piece * inverse, p))
    return error / size if size else (math.inf if error else 0.0)


_TABLE_DTYPE = {"int8": torch.int8, "fp16": torch.float16}


def _parameters(scheme: Scheme) -> tuple[str, ...]:
    """Return the names of what is stored for one quantizer of a scheme."""
    if scheme.method == "uniform":
        return "codes", "scale", "zero_point", "factor"
    if scheme.method == "kmeans":
        return ("codes", "codebook", "scale", "factor") if scheme.table == "int8" else ("codes", "codebook", "factor")
    return "codes", "scale", "factor"


def _fit_uniform(rows: Tensor, ordered: kmeans.SortedRows | None, scheme: Scheme) -> dict[str, Tensor]:
    scale, zero_point = uniform.search_range(rows, scheme.bits)
    return {"codes": uniform.encode(rows, scale, zero_point, scheme.bits), "scale": scale, "zero_point": zero_point}


def _fit_kmeans(rows: Tensor, ordered: kmeans.SortedRows | None, scheme: Scheme) -> dict[str, Tensor]:
    assert ordered is not None
    codebook, counts = kmeans.fit_codebook(ordered, scheme.bits)
    if scheme.table == "int8":
        table, scale = round_codebook(codebook, counts)
        return {"codes": kmeans.encode(rows, table * scale[:, None].float()), "codebook": table, "scale": scale}
    return {"codes": kmeans.encode(rows, codebook.half()), "codebook": codebook.half()}


def _fit_log2(rows: Tensor, ordered: kmeans.SortedRows | None, scheme: Scheme) -> dict[str, Tensor]:
    scale = log2.search_scale(rows, scheme.bits)
    table = log2.grid(scheme.bits).to(rows.device) * scale.float()[:, None]
    return {"codes": nearest_codes(rows, table), "scale": scale}


_FIT: dict[str, Callable[[Tensor, kmeans.SortedRows | None, Scheme], dict[str, Tensor]]] = {
    "uniform": _fit_uniform,
    "kmeans": _fit_kmeans,
    "log2": _fit_log2,
}


def _fit(
    scheme: Scheme, blocks: list[Tensor], sorted_blocks: list[kmeans.SortedRows], size: torch.Size
) -> dict[str, Tensor]:
    """Fit the blocks of equal rows and join them: codes packed, parameters [lines, groups, ...]."""
    lines, _, length = row_layout(size[0], size[1], scheme)
    fits = [
        _FIT[scheme.method](rows, sorted_blocks[i] if sorted_blocks else None, scheme) for i, rows in enumerate(blocks)
    ]
    k = min(2**scheme.bits, length)
    joined = {}
    for key in fits[0]:
        values = [fit[key] for fit in fits]
        if key == "codebook":  # a shorter last group may have fewer weights than entries: its last entry is repeated
            values = [torch.cat([v, v[:, -1:].expand(-1, k - v.shape[1])], dim=1) for v in values]
        shape = (lines, -1) if key != "codebook" else (lines, -1, k)
        joined[key] = torch.cat([v.reshape(shape) for v in values], dim=1).contiguous()
    joined["codes"] = pack_codes(joined["codes"].reshape(-1), scheme.bits)
    return joined


def _decode_half_(columns: Tensor, scheme: Scheme, tensors: dict[str, Tensor], limit: float) -> None:
    """Decode into `columns` [C, n], a view of the whole weight's matrix."""
    lines = columns.shape[0]
    codes = unpack_codes(tensors["codes"], scheme.bits, columns.numel()).view(columns.shape)
    if scheme.method == "kmeans":
        values = tensors["codebook"].float()
        if scheme.table == "int8":
            values = values * tensors["scale"].float()[:, :, None]
    elif scheme.method == "log2":
        values = tensors["scale"].float()[:, :, None] * log2.grid(scheme.bits).to(codes.device)
    else:
        values = tensors["scale"].float()[:, :, None]
    values = values * tensors["factor"]
    zero_point = tensors.get("zero_point")
    if scheme.granularity == "tensor" and columns.is_contiguous():
        codes, columns = codes.view(1, -1), columns.view(1, -1)
    elif scheme.granularity == "tensor":  # half of a split weight: decode per channel with the one set of values
        values = values.expand(lines, -1, -1)
        zero_point = None if zero_point is None else zero_point.expand(lines, -1)
    by_channel = scheme if scheme.granularity == "group" else Scheme(method=scheme.method, bits=scheme.bits)
    first = 0
    for source, target in zip(row_blocks(codes, by_channel), row_blocks(columns, by_channel), strict=True):
        groups = slice(first, first + source.shape[1])
        first = groups.stop
        if zero_point is not None:
            uniform.decode_(target, source, values[:, groups, 0], zero_point[:, groups], scheme.bits, limit)
        else:
            gather_(target, source, values[:, groups].clamp(-limit, limit))


def _halves(shape: tuple[int, ...], split: int | None) -> Iterator[tuple[str, slice]]:
    """Yield (suffix of the stored names, columns of the flattened matrix) of each quantizer."""
    columns = math.prod(shape[1:])
    if split is None:
        yield "", slice(0, columns)
    else:
        seam = split * math.prod(shape[2:])
        yield ".0", slice(0, seam)
        yield ".1", slice(seam, columns)


def _factor(weight: Tensor) -> float:
    """Return the power of two by which the weight is divided: max|w| / factor lies in [2^14, 2^15)."""
    _, exponent = math.frexp(float(weight.abs().max()))
    return math.ldexp(1.0, max(exponent - 15, -125))  # -125: a normal float32, and so is its inverse


def _check_weight(weight: Tensor, split: int | None, name: str) -> Tensor:
    """Return the weight as a float32 matrix [C_out, n] after checking it."""
    if not weight.is_floating_point() or weight.dim() < 2 or weight.numel() == 0:
        got = f"{weight.dtype} {tuple(weight.shape)}"
        raise QuantDMError(f"{name}: got {got}, expected a float tensor [C_out, C_in, ...] that is not empty")
    if weight.is_meta:
        raise QuantDMError(f"{name}: got a tensor on the meta device, expected one with values; load the weights first")
    if split is not None and not 0 < split < weight.shape[1]:
        raise QuantDMError(f"{name}: got split={split}, expected an input channel between 1 and {weight.shape[1] - 1}")
    matrix = weight.detach().to(torch.float32).reshape(weight.shape[0], -1)
    bad = int((~torch.isfinite(matrix)).sum())
    if bad:
        raise QuantDMError(f"{name}: got {bad} NaN or infinite weights of {weight.numel()}, expected finite ones")
    return matrix
