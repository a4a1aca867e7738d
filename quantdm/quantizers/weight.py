"""One quantized weight: what is stored of it, how many bits that is, and how it is decoded.

A weight [C_out, C_in/groups, *kernel] is flattened per output channel. With `split` (the input channel of the seam of a
long-skip concatenation) its two halves along dim 1 take a quantizer each, and stored names end in ".0" and ".1".
Every quantizer stores packed codes, fp16 scales, int8 or fp16 codebooks, and one fp32 `factor`, a power of two: the
weight divided by it lies below 2^15, so scales and codebooks are normal fp16 numbers at any size, and the division is
exact.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantdm.errors import QuantDMError
from quantdm.quantizers import fused, log2, shared, uniform
from quantdm.quantizers.branches import add_branches, stored_branches
from quantdm.quantizers.packing import packed_size, unpack_at, unpack_codes
from quantdm.quantizers.rows import pieces, row_blocks, row_layout
from quantdm.quantizers.tables import gather_
from quantdm.quantizers.turning import turned_back
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
        in_place = self.scheme.is_in_place
        dtype = out.dtype if in_place else torch.float32
        is_direct = out.is_contiguous() and out.dtype == dtype
        target = out if is_direct else torch.empty(self.shape, dtype=dtype, device=out.device)
        matrix = target.view(self.shape[0], -1)
        limit = min(torch.finfo(self.dtype).max, torch.finfo(torch.float32).max)
        for suffix, columns in halves(self.shape, self.split):
            tensors = {name: self.tensors[name + suffix] for name in parameters_of(self.scheme)}
            _decode_half_(matrix[:, columns], self.scheme, tensors, limit)
        if not in_place:
            dense = turned_back(target, self.scheme, self.tensors, self.split)
            target = add_branches(dense, self.scheme, self.tensors).clamp_(-limit, limit)
        return out if target is out else out.copy_(target)

    def to(self, device: torch.device) -> "QuantizedWeight":
        """Return the weight on a device."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})

    def rows(self, index: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Decode some rows alone, [len(index), *shape[1:]]: bit by bit those of `dequantize`.

        Args:
            index: int64 [R], each below the number of rows.
            dtype: as in `dequantize`.

        Raises:
            QuantDMError: a weight that is split.
        """
        if self.split is not None:
            raise QuantDMError(f"rows: the weight is split at input channel {self.split}; decode it as a whole")
        dtype = dtype or self.dtype
        columns = math.prod(self.shape[1:])
        places = index[:, None] * columns + torch.arange(columns, device=index.device)
        codes = unpack_at(self.tensors["codes"], self.scheme.bits, self.shape[0] * columns, places)
        in_place = self.scheme.is_in_place
        target = dtype if in_place else torch.float32
        out = torch.empty((len(index), *self.shape[1:]), dtype=target, device=codes.device)
        limit = min(torch.finfo(self.dtype).max, torch.finfo(torch.float32).max)
        if len(index):
            tensors = _parameters_at(self.scheme, self.tensors, index)
            _decode_codes_(out.view(len(index), -1), codes, self.scheme, tensors, limit)
        if in_place:
            return out
        out = turned_back(out, self.scheme, self.tensors, None)
        return add_branches(out, self.scheme, self.tensors, index).clamp_(-limit, limit).to(dtype)


def stored_tensors(
    shape: Sequence[int], scheme: Scheme, split: int | None = None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return name -> (shape, dtype) of what is stored for a weight of this shape.

    "codes" is flat uint8; "scale" fp16 and "zero_point" int16 are [lines, groups], "factor" fp32 is [1]; "codebook" is
    [lines, groups, k] with k = min(2^bits, weights per row), int8 (times "scale") or fp16 as the scheme's `table` says;
    see rows.py for lines and groups. A shared codebook is [1, 1, 2^bits]; its scales per group are int8, in units of
    "scale_step" fp16, one for every 256 of them. "exponents" int8 [C_in / groups] are those of an equalised weight;
    for the factors of branches see `stored_branches`.

    Raises:
        QuantDMError: a branch of a higher rank than the weight has.
    """
    stored, k, is_shared = {}, 2**scheme.bits, scheme.granularity == "shared"
    for suffix, columns in halves(tuple(shape), split):
        count = shape[0] * (columns.stop - columns.start)
        lines, groups, length = row_layout(shape[0], columns.stop - columns.start, scheme)
        sizes = {
            "codes": ((packed_size(count, scheme.bits),), torch.uint8),
            "scale": ((lines, groups), torch.int8 if is_shared and scheme.group_size else torch.float16),
            "scale_step": ((-(-lines * groups // shared.CHUNK),), torch.float16),
            "zero_point": ((lines, groups), torch.int16),
            "codebook": (
                (1, 1, k) if is_shared else (lines, groups, min(k, length)),
                _TABLE_DTYPE[scheme.table or "fp16"],
            ),
            "factor": ((1,), torch.float32),
        }
        stored |= {key + suffix: sizes[key] for key in parameters_of(scheme)}
    if scheme.equalised is not None:
        stored["exponents"] = ((shape[1],), torch.int8)
    return stored | stored_branches(shape, scheme)


def count_bits(shape: Sequence[int], scheme: Scheme, split: int | None = None) -> int:
    """Return the exact bits of a weight of this shape: codes N·b and what every row has.

    A row has a scale of 16 bits, asymmetric uniform a zero point of 16 more, k-means a codebook of 8·k (int8 table; an
    fp16 table takes 16·k and no scale). A shared codebook has 16·k bits once, and scales of 16 bits per channel or 8
    per group with a step of 16 for every 256. The 32 bits of each quantizer's factor are counted, and 8 for every input
    channel of an equalised weight, and the factors of a branch; padding is not. A weight that is left as it is has 16 a
    weight.
    """
    if scheme.method == "original":
        return math.prod(shape) * scheme.bits
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
    inverse = 1 / factor_of(w)  # powers of tiny weights must not underflow
    error = size = 0.0
    for _, part in pieces(1, w.numel(), ERROR_CHUNK):
        piece = w[part].float()
        error += float(uniform.power_sum((piece - w_hat[part].float()).mul_(inverse), p))
        size += float(uniform.power_sum(piece * inverse, p))
    return error / size if size else (math.inf if error else 0.0)


_TABLE_DTYPE = {"int8": torch.int8, "fp16": torch.float16}


def parameters_of(scheme: Scheme) -> tuple[str, ...]:
    """Return the names of what is stored for one quantizer of a scheme."""
    if scheme.method == "uniform":
        return ("codes", "scale", "factor") if scheme.symmetric else ("codes", "scale", "zero_point", "factor")
    if scheme.granularity == "shared":
        return ("codes", "codebook", "scale", *(("scale_step",) if scheme.group_size else ()), "factor")
    if scheme.method == "kmeans":
        return ("codes", "codebook", "scale", "factor") if scheme.table == "int8" else ("codes", "codebook", "factor")
    return "codes", "scale", "factor"


def tables_of(scheme: Scheme, parameters: dict[str, Tensor]) -> Tensor:
    """Return the table of every row, float32 [lines, groups, k]; weights are divided by `factor`.

    Entries ascend, or descend where the scale is negative.
    """
    if scheme.method == "kmeans":
        codebook = parameters["codebook"].float()
        if scheme.granularity == "shared":
            return codebook * shared.scales_of(parameters["scale"], parameters.get("scale_step"))[:, :, None]
        return codebook * parameters["scale"].float()[:, :, None] if scheme.table == "int8" else codebook
    scale = parameters["scale"].float()[:, :, None]
    if scheme.method == "log2":
        return scale * log2.grid(scheme.bits, half_steps=scheme.half_steps).to(scale.device)
    codes = torch.arange(2**scheme.bits, dtype=torch.float32, device=scale.device)
    zero_point = 2 ** (scheme.bits - 1) if scheme.symmetric else parameters["zero_point"].float()[:, :, None]
    return (codes - zero_point) * scale


def _decode_half_(columns: Tensor, scheme: Scheme, tensors: dict[str, Tensor], limit: float) -> None:
    """Decode into `columns` [C, n], a view of the whole weight's matrix."""
    if fused.decode_(columns, scheme, tensors, limit):
        return
    codes = unpack_codes(tensors["codes"], scheme.bits, columns.numel()).view(columns.shape)
    _decode_codes_(columns, codes, scheme, tensors, limit)


def _parameters_at(scheme: Scheme, tensors: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """Return what decodes some rows of a weight; the scales of shared codebooks without their steps."""
    found = {name: tensors[name] for name in parameters_of(scheme) if name not in ("codes", "scale_step")}
    if scheme.granularity == "tensor":
        return found
    if scheme.granularity == "shared":
        return found | {"scale": shared.scales_of(tensors["scale"], tensors.get("scale_step"))[index]}
    return {name: value if name == "factor" else value[index] for name, value in found.items()}


def _decode_codes_(columns: Tensor, codes: Tensor, scheme: Scheme, tensors: Mapping[str, Tensor], limit: float) -> None:
    """Decode codes [C, n] with the parameters of their rows into `columns`."""
    lines = columns.shape[0]
    zero_point = tensors.get("zero_point")
    if scheme.symmetric:
        zero_point = torch.full_like(tensors["scale"], 2 ** (scheme.bits - 1))
    # Equal steps are multiplied, which is quicker than looking them up.
    values = tables_of(scheme, dict(tensors)) if zero_point is None else tensors["scale"].float()[:, :, None]
    values = values * tensors["factor"]
    if scheme.granularity == "tensor" and columns.is_contiguous():
        codes, columns = codes.view(1, -1), columns.view(1, -1)
    elif scheme.granularity == "tensor":  # half of a split weight: decode per channel with the one set of values
        values = values.expand(lines, -1, -1)
        zero_point = None if zero_point is None else zero_point.expand(lines, -1)
    by_channel = Scheme(method=scheme.method, bits=scheme.bits) if scheme.granularity == "tensor" else scheme
    first = 0
    for source, target in zip(row_blocks(codes, by_channel), row_blocks(columns, by_channel), strict=True):
        groups = slice(first, first + source.shape[1])
        first = groups.stop
        if zero_point is not None:
            uniform.decode_(target, source, values[:, groups, 0], zero_point[:, groups], scheme.bits, limit)
        else:
            gather_(target, source, values[:, groups].clamp(-limit, limit))


def halves(shape: tuple[int, ...], split: int | None) -> Iterator[tuple[str, slice]]:
    """Yield (suffix of the stored names, columns of the flattened matrix) of each quantizer."""
    columns = math.prod(shape[1:])
    if split is None:
        yield "", slice(0, columns)
    else:
        seam = split * math.prod(shape[2:])
        yield ".0", slice(0, seam)
        yield ".1", slice(seam, columns)


def factor_of(weight: Tensor) -> float:
    """Return the power of two by which the weight is divided: max|w| / factor lies in [2^14, 2^15)."""
    _, exponent = math.frexp(float(weight.abs().max()))
    return math.ldexp(1.0, max(exponent - 15, -125))  # -125: a normal float32, and so is its inverse
