"""The int8 form of a quantized weight: one byte a weight and the scale of its row, decoded by one multiplication.

It exists where every value of a row is a whole multiple of a scale: w_hat = (codes + offset)·scale. That are uniform
weights (the offset is a shifted zero point, often none), k-means with an int8 codebook, and log2 of up to 3 bits, where
the least power of two is the scale. It lives in memory only, gives the same bits as the packed weight, is never stored.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from quantdm.quantizers import QuantizedWeight
from quantdm.quantizers.weight import halves

PIECE = 2**16  # elements decoded at a time on a CPU: their temporaries stay in the cache
LEAST, MOST = -128, 127


class _Part(NamedTuple):
    """Consecutive columns of the matrix [C, n]: `groups` groups of equal length with a scale each."""

    columns: slice
    groups: int
    scale: Tensor  # float32 [C or 1, groups, 1]
    offset: Tensor | None  # float32 whole numbers, of the same shape; None: zero everywhere


class Int8Weight(NamedTuple):
    """Codes int8 [C, n] and what they mean, part by part."""

    codes: Tensor
    parts: tuple[_Part, ...]

    @property
    def device(self) -> torch.device:
        """Where the form is."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        kept = [tensor for part in self.parts for tensor in (part.scale, part.offset) if tensor is not None]
        return self.codes.nbytes + sum(tensor.nbytes for tensor in kept)

    def to(self, device: torch.device) -> "Int8Weight":
        """Return the form on another device; no tensor is cast."""
        parts = (
            part._replace(
                scale=moved(part.scale, device), offset=None if part.offset is None else moved(part.offset, device)
            )
            for part in self.parts
        )
        return Int8Weight(moved(self.codes, device), tuple(parts))

    def decode(self, out: Tensor) -> Tensor:
        """Write (codes + offset)·scale into `out` (as many elements as codes), computed in float32."""
        matrix = out.view(self.codes.shape)
        for part in self.parts:
            source = self.codes[:, part.columns].unflatten(1, (part.groups, -1))
            target = matrix[:, part.columns].unflatten(1, (part.groups, -1))
            for lines in _pieces(source):
                codes = source[lines]
                codes = codes if part.offset is None else codes + _of_lines(part.offset, lines)
                torch.mul(codes, _of_lines(part.scale, lines), out=target[lines])
        return out

    def traced(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [C, n] by plain operations without pieces, which a compiler fuses."""
        decoded = []
        for part in self.parts:
            codes = self.codes[:, part.columns].unflatten(1, (part.groups, -1)).float()
            codes = codes if part.offset is None else codes + part.offset
            decoded.append((codes * part.scale).to(dtype).flatten(1))
        return torch.cat(decoded, dim=1)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on another device; from the meta device comes one whose values are still to be loaded."""
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)


def int8_form(quantized: QuantizedWeight) -> Int8Weight | None:
    """Return the int8 form of a weight, or None where there is none with exactly the same values.

    K-means with fp16 codebooks and log2 of 4 bits and more have none.
    """
    dense = quantized.dequantize(dtype=torch.float32).flatten(1)
    codes, parts = torch.empty(dense.shape, dtype=torch.int8, device=dense.device), []
    for columns, scale in _scales(quantized):
        values = dense[:, columns].unflatten(1, (scale.shape[1], -1))
        whole = torch.round(values / scale)
        rows = (2,) if scale.shape[0] == len(dense) else (0, 2)
        low, high = whole.amin(rows, keepdim=True), whole.amax(rows, keepdim=True)
        fits = (low >= LEAST) & (high <= MOST)
        offset = torch.where(fits, 0.0, low - LEAST)
        narrow = (whole - offset).to(torch.int8)
        # Decoded again the values must be the same, which also finds rows that are too wide, saturated or subnormal.
        if not torch.equal((narrow + offset) * scale, values):
            return None
        codes[:, columns] = narrow.flatten(1)
        parts.append(_Part(columns, scale.shape[1], scale, None if bool(fits.all()) else offset))
    return Int8Weight(codes, tuple(parts)) if parts else None


def _scales(quantized: QuantizedWeight) -> Iterator[tuple[slice, Tensor]]:
    """Yield columns [C, n] and the float32 [C or 1, groups, 1] of which their values may be whole multiples."""
    scheme, tensors = quantized.scheme, quantized.tensors
    least = 2.0 ** (1 - 2 ** (scheme.bits - 1)) if scheme.method == "log2" else 1.0
    for suffix, half in halves(quantized.shape, quantized.split):
        if f"scale{suffix}" not in tensors:
            return
        scale = (tensors[f"scale{suffix}"].float() * tensors[f"factor{suffix}"] * least)[:, :, None]
        length = scheme.group_size or (half.stop - half.start)
        full = min((half.stop - half.start) // length, scale.shape[1])
        if full:
            yield slice(half.start, half.start + full * length), scale[:, :full]
        if full < scale.shape[1]:  # the last group of a channel may be shorter
            yield slice(half.start + full * length, half.stop), scale[:, full:]


def _pieces(source: Tensor) -> Iterator[slice]:
    step = len(source) if source.device.type != "cpu" else max(PIECE // source[0].numel(), 1)
    yield from (slice(first, first + step) for first in range(0, len(source), step))


def _of_lines(tensor: Tensor, lines: slice) -> Tensor:
    return tensor if len(tensor) == 1 else tensor[lines]
