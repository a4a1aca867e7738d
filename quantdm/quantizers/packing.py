"""Pack codes of 2 to 8 bits into bit planes: exactly b bits per code, decoded with shifts and masks only.

A code is split into planes of power-of-two width, widest first: 2=[2] 3=[2,1] 4=[4] 5=[4,1] 6=[4,2] 7=[4,2,1] 8=[8].
The layout of a plane is planar: with w bits per field a byte holds 8/w codes that lie one slice apart, so that field s
of all bytes is the contiguous slice s of the codes. The codes are first padded with zeros to a multiple of 8; that is
the only waste, b·ceil(count/8) bytes in all.
"""

import torch
from torch import Tensor

from quantdm.errors import QuantDMError
from quantdm.schemes import MAX_BITS, MIN_BITS

PLANE_WIDTHS: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that `count` codes of `bits` bits take."""
    return bits * -(-count // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack flat uint8 codes into flat uint8 bytes.

    Raises:
        QuantDMError: `bits` outside 2-8, codes not flat uint8, or a code that needs more than `bits` bits.
    """
    _check(codes, bits, "codes")
    if codes.numel() and int(codes.max()) >> bits:
        raise QuantDMError(f"codes: got a code of {int(codes.max())}, expected at most {2**bits - 1} at {bits} bits")
    padded = torch.nn.functional.pad(codes, (0, -codes.numel() % 8))
    planes, offset = [], 0
    for width in PLANE_WIDTHS[bits]:
        fields = ((padded >> offset) & (2**width - 1)).view(8 // width, -1)
        plane = fields[0].clone()
        for s in range(1, 8 // width):
            plane |= fields[s] << (s * width)
        planes.append(plane)
        offset += width
    return torch.cat(planes)


def unpack_codes(packed: Tensor, bits: int, count: int, out: Tensor | None = None) -> Tensor:
    """Unpack `count` codes, into `out` (flat, contiguous uint8 of `count` elements) when given.

    Raises:
        QuantDMError: `bits` outside 2-8, or sizes and dtypes that do not fit.
    """
    _check(packed, bits, "packed codes")
    if packed.numel() != packed_size(count, bits):
        expected = packed_size(count, bits)
        raise QuantDMError(f"packed codes: got {packed.numel()} bytes, expected {expected} for {count} x {bits} bits")
    if out is None:
        out = torch.empty(count, dtype=torch.uint8, device=packed.device)
    elif out.dtype != torch.uint8 or out.shape != (count,) or not out.is_contiguous():
        raise QuantDMError(f"out: got {out.dtype} {tuple(out.shape)}, expected contiguous torch.uint8 ({count},)")
    eighth = packed.numel() // bits  # ceil(count / 8): a plane of width w has w times as many bytes
    first, offset = 0, 0
    for width in PLANE_WIDTHS[bits]:
        size = width * eighth
        plane, scratch = packed[first : first + size], None
        for s in range(8 // width):
            length = min(size, count - s * size)
            if length <= 0:
                break
            source, target = plane[:length], out[s * size : s * size + length]
            if offset == 0:
                _move_field(source, s * width, width, 0, target)
            else:
                scratch = torch.empty_like(plane) if scratch is None else scratch
                _move_field(source, s * width, width, offset, scratch[:length])
                target |= scratch[:length]
        first += size
        offset += width
    return out


def unpack_at(packed: Tensor, bits: int, count: int, places: Tensor) -> Tensor:
    """Unpack the codes at some `places` (int64, each below `count`) alone; uint8 in the shape of `places`.

    Raises:
        QuantDMError: as `unpack_codes`.
    """
    _check(packed, bits, "packed codes")
    if packed.numel() != packed_size(count, bits):
        expected = packed_size(count, bits)
        raise QuantDMError(f"packed codes: got {packed.numel()} bytes, expected {expected} for {count} x {bits} bits")
    codes = torch.zeros(places.shape, dtype=torch.uint8, device=packed.device)
    eighth, first, offset = packed.numel() // bits, 0, 0
    for width in PLANE_WIDTHS[bits]:
        size = width * eighth
        low = places.div(size, rounding_mode="floor").mul_(width).to(torch.uint8)
        field = packed[first + places % size].bitwise_right_shift_(low) & (2**width - 1)
        codes |= field << offset
        first += size
        offset += width
    return codes


def _move_field(source: Tensor, low: int, width: int, offset: int, out: Tensor) -> None:
    """Write the `width` bits of each byte that start at bit `low` to `out`, where they start at bit `offset`."""
    if low >= offset:
        torch.bitwise_right_shift(source, low - offset, out=out)
    else:
        torch.bitwise_left_shift(source, offset - low, out=out)
    if offset or low + width < 8:  # the top field needs no mask after a shift to bit 0
        out &= (2**width - 1) << offset


def _check(tensor: Tensor, bits: int, what: str) -> None:
    if bits not in PLANE_WIDTHS:
        raise QuantDMError(f"bits: got {bits}, expected {MIN_BITS} to {MAX_BITS}")
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise QuantDMError(f"{what}: got {tensor.dtype} {tuple(tensor.shape)}, expected flat torch.uint8")
