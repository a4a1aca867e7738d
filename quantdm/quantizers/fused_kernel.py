"""The Triton kernel that decodes a quantizer's packed codes; imported only where Triton is (see fused.py)."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def _field(codes, base, size, lane, inside, WIDTH: tl.constexpr):
    """Return the bits that a plane of `size` bytes has of the codes base + lane; at most one seam lies among them."""
    seam = base // size
    place = base - seam * size + lane
    over = place >= size
    byte = tl.load(codes + tl.where(over, place - size, place), mask=inside, other=0).to(tl.int32)
    low = (seam.to(tl.int32) + over.to(tl.int32)) * WIDTH
    return (byte >> low) & ((1 << WIDTH) - 1)


@triton.jit(do_not_specialize=["blocks", "groups"])  # one compilation for all of their values
def decode(
    codes, table, scale, zero_point, factor, out,
    columns, blocks, stride, groups, eighth, limit,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr,
    ENTRIES: tl.constexpr, ONE_TABLE: tl.constexpr, SCALED: tl.constexpr, ZERO: tl.constexpr,
    ONE_ROW: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decode `BLOCK` columns of one line: unpack the codes, look them up or count steps, scale, saturate, cast.

    W0, W1, W2 are the widths of the bit planes (0: none). ENTRIES > 0: a table of so many entries per row, or one for
    all; 0: equal steps from the zero point, which is ZERO where none is stored. Float32 in the order of the eager path.
    """
    line = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * BLOCK
    lane = tl.arange(0, BLOCK)
    column = first + lane
    inside = column < columns
    base = line.to(tl.int64) * columns + first
    wide = eighth.to(tl.int64)
    code = _field(codes, base, wide * W0, lane, inside, W0)
    if W1 > 0:
        code |= _field(codes + wide * W0, base, wide * W1, lane, inside, W1) << W0
    if W2 > 0:
        code |= _field(codes + wide * (W0 + W1), base, wide * W2, lane, inside, W2) << (W0 + W1)
    if ONE_ROW:
        row = tl.zeros([BLOCK], tl.int64)
    elif LENGTH > 0:
        row = line.to(tl.int64) * groups + column // LENGTH
    else:
        row = line.to(tl.int64) + tl.zeros([BLOCK], tl.int64)
    if ENTRIES > 0:
        entry = code if ONE_TABLE else row * ENTRIES + code
        value = tl.load(table + entry, mask=inside, other=0).to(tl.float32)
        if SCALED:
            value = value * tl.load(scale + row, mask=inside, other=0).to(tl.float32)
        value = value * tl.load(factor)
    else:
        if ZERO < 0:
            zero = tl.load(zero_point + row, mask=inside, other=0).to(tl.float32)
        else:
            zero = tl.full([BLOCK], ZERO, tl.float32)
        step = tl.load(scale + row, mask=inside, other=0).to(tl.float32) * tl.load(factor)
        value = (code.to(tl.float32) - zero) * step
    value = tl.minimum(tl.maximum(value, -limit), limit)
    tl.store(out + line.to(tl.int64) * stride + column, value.to(out.dtype.element_ty), mask=inside)
