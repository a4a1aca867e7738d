"""Decoding on an accelerator by one kernel: packed codes and parameters in, a weight of the wanted dtype out.

Eagerly every shift, mask, lookup and cast is a pass over memory and a launch, some forty bytes and a dozen launches for
every quantizer; one kernel reads b/8 bytes a weight and writes the result, and a CUDA graph can hold it. It gives the
same bits as the eager path. It needs Triton, which comes with torch for CUDA; where that is missing, cannot compile or
answers otherwise when it is asked for a known result, the eager path decodes, and the log says so once.
"""

import logging
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from quantdm.quantizers import log2, shared
from quantdm.quantizers.packing import PLANE_WIDTHS, pack_codes, packed_size, unpack_codes
from quantdm.quantizers.rows import row_layout
from quantdm.schemes import Scheme

KERNEL = "quantdm.quantizers.fused_kernel"
BLOCKS = (1024, 512, 256, 128, 64, 32, 16)  # columns that one program decodes
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that it writes
_log = logging.getLogger("quantdm")
wanted = True  # whether it is used at all, for the whole process
_asked: set[torch.device] = set()


class _Parameters(NamedTuple):
    """What one launch needs beside the codes; `table` is [rows or 1, entries], None for equal steps."""

    table: Tensor | None
    scale: Tensor | None
    zero_point: Tensor | None
    middle: int  # the zero point where none is stored; -1: it is


def decode_(columns: Tensor, scheme: Scheme, tensors: Mapping[str, Tensor], limit: float) -> bool:
    """Decode a quantizer into `columns` [C, n] (rows may lie apart), saturated at +-limit; False: nothing was done.

    Args:
        columns: on an accelerator, float32, bfloat16 or float16.
        scheme: of the quantizer, without branches.
        tensors: stored tensors by name.
        limit: the largest value of the weight's original dtype.
    """
    if not wanted or not columns.is_cuda or not _serves(columns, scheme, tensors):
        return False
    with torch.cuda.device(columns.device):  # Triton launches on the current one, wherever its arguments are
        if torch.cuda.is_current_stream_capturing() and columns.device not in _asked:
            return False  # asking copies results to the processor, which a capture does not allow
        if not _works(columns.device):
            return False
        _launch(columns, scheme, tensors, limit)
    return True


def _serves(columns: Tensor, scheme: Scheme, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the kernel would read and write what is meant; it looks at addresses only, the eager path has errors."""
    if columns.dtype not in DTYPES or columns.stride(1) != 1 or _block_of(columns, scheme) is None:
        return False
    if len(tensors["codes"]) != packed_size(columns.numel(), scheme.bits):
        return False
    return all(tensor.device == columns.device and tensor.is_contiguous() for tensor in tensors.values())


def _block_of(columns: Tensor, scheme: Scheme) -> int | None:
    return _block(columns.shape[1], scheme.bits, columns.numel())


def _block(columns: int, bits: int, count: int) -> int | None:
    """Return how many columns a program decodes: few lanes idle, and at most one seam of a plane among them."""
    least = packed_size(count, bits) // bits * min(PLANE_WIDTHS[bits])
    fitting = [block for block in BLOCKS if block <= least]
    return min(fitting, key=lambda block: -(-columns // block) * (block + 32), default=None)


def _launch(columns: Tensor, scheme: Scheme, tensors: Mapping[str, Tensor], limit: float) -> None:
    lines, width = columns.shape
    block = _block_of(columns, scheme)
    assert block is not None
    of_rows, groups, length = row_layout(lines, width, scheme)
    found, codes = _parameters(scheme, tensors), tensors["codes"]
    blocks, widths = -(-width // block), (*PLANE_WIDTHS[scheme.bits], 0, 0)
    unused = codes
    entries = 0 if found.table is None else found.table.shape[-1]
    import_module(KERNEL).decode[(lines * blocks,)](
        codes,
        unused if found.table is None else found.table,
        unused if found.scale is None else found.scale,
        unused if found.zero_point is None else found.zero_point,
        tensors["factor"], columns, width, blocks, columns.stride(0), groups, len(codes) // scheme.bits, limit,
        W0=widths[0], W1=widths[1], W2=widths[2],
        ENTRIES=entries, ONE_TABLE=found.table is not None and found.table.numel() == entries,
        SCALED=found.scale is not None, ZERO=found.middle,
        ONE_ROW=scheme.granularity == "tensor" or of_rows * groups == 1, LENGTH=length if groups > 1 else 0,
        BLOCK=block,
    )  # fmt: skip


def _parameters(scheme: Scheme, tensors: Mapping[str, Tensor]) -> _Parameters:
    scale = tensors.get("scale")
    if scheme.method == "uniform":
        return _Parameters(None, scale, tensors.get("zero_point"), 2 ** (scheme.bits - 1) if scheme.symmetric else -1)
    if scheme.method == "log2":
        assert scale is not None
        return _Parameters(_grid(scheme.bits, scheme.half_steps, scale.device), scale, None, 0)
    if scheme.granularity == "shared":
        assert scale is not None
        return _Parameters(tensors["codebook"], shared.scales_of(scale, tensors.get("scale_step")), None, 0)
    return _Parameters(tensors["codebook"], scale if scheme.table == "int8" else None, None, 0)


@cache
def _grid(bits: int, half_steps: bool, device: torch.device) -> Tensor:
    return log2.grid(bits, half_steps=half_steps).to(device)


@cache
def _works(device: torch.device) -> bool:
    """Whether the kernel can be compiled for a device and gives there what it should."""
    _asked.add(device)
    if find_spec("triton") is None:
        _log.warning("%s: Triton is not installed; packed weights are decoded operation by operation, slowly", device)
        return False
    try:
        for bits, half_steps in product(PLANE_WIDTHS, (False, True)):
            _grid(bits, half_steps, device)  # now: a capture could not copy it from the processor
        wrong = [label for label, dtype in _EXAMPLES if not _is_right(Scheme.parse(label), dtype, device)]
    except Exception as error:  # a compiler that is missing, a device that it does not know: it raises what it likes
        _log.warning("%s: the decoding kernel cannot be used (%.120s); it goes on without", device, str(error).strip())
        return False
    if wrong:
        _log.warning("%s: the decoding kernel is wrong for %s; it goes on without", device, ", ".join(wrong))
    return not wrong


# Every width once, every kind of parameters, a group that ends short, every dtype.
_EXAMPLES = (
    ("kmeans-channel-2-fp16", torch.float32), ("kmeans-shared32-3", torch.bfloat16),
    ("kmeans-channel-4", torch.bfloat16), ("uniform-group32-5", torch.bfloat16), ("log2-channel-6", torch.float32),
    ("kmeans-tensor-7-int8", torch.float16), ("uniform-channel-8-symmetric", torch.bfloat16),
)  # fmt: skip
_LINES, _WIDTH, _LIMIT = 5, 80, 8.0  # of an example; some of its values lie beyond the limit


def _is_right(scheme: Scheme, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether random codes and parameters decode, bit by bit, to what plain arithmetic gives, and nothing else changes.

    They are written into the right half of a matrix, as those of the second half of a weight are.
    """
    tensors = _example(scheme)
    out = torch.full((_LINES, 2 * _WIDTH), torch.nan, dtype=dtype, device=device)
    _launch(out[:, _WIDTH:], scheme, {name: tensor.to(device) for name, tensor in tensors.items()}, _LIMIT)
    beside, found = out.cpu().tensor_split(2, dim=1)
    return bool(beside.isnan().all()) and torch.equal(found, _expected(scheme, tensors).to(dtype))


def _example(scheme: Scheme) -> dict[str, Tensor]:
    """Return random codes and parameters, on the processor."""
    k, rng = 2**scheme.bits, torch.Generator().manual_seed(0)
    rows, groups, _ = row_layout(_LINES, _WIDTH, scheme)
    codes = torch.randint(k, (_LINES * _WIDTH,), generator=rng, dtype=torch.uint8)
    found = {"codes": pack_codes(codes, scheme.bits), "factor": torch.tensor([0.25])}
    scale = torch.rand(rows, groups, generator=rng).half()
    if scheme.method == "kmeans":
        tables = (1, 1, k) if scheme.granularity == "shared" else (rows, groups, k)
        table = torch.randint(-127, 128, tables, generator=rng, dtype=torch.int8)
        found["codebook"] = table if scheme.table == "int8" else table.half() * 0.37
    elif scheme.method == "uniform" and not scheme.symmetric:
        found["zero_point"] = torch.randint(k, (rows, groups), generator=rng, dtype=torch.int16)
    if scheme.granularity == "shared" and scheme.group_size:
        found["scale"] = torch.randint(-127, 128, scale.shape, generator=rng, dtype=torch.int8)
        found["scale_step"] = torch.full((1,), 0.01).half()
    elif scheme.method != "kmeans" or scheme.granularity == "shared" or scheme.table == "int8":
        found["scale"] = scale
    return found


def _expected(scheme: Scheme, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return what an example decodes to, float32 [lines, width], one operation after another."""
    rows, groups, length = row_layout(_LINES, _WIDTH, scheme)
    row = torch.arange(_LINES)[:, None] * groups + torch.arange(_WIDTH) // length
    row = row if rows * groups > 1 else torch.zeros_like(row)
    codes = unpack_codes(tensors["codes"], scheme.bits, row.numel()).long().view(row.shape)
    found, factor = _parameters(scheme, tensors), tensors["factor"]
    scale = None if found.scale is None else found.scale.float().flatten()[row]
    if found.table is None:
        assert scale is not None
        zero = found.middle if found.zero_point is None else found.zero_point.float().flatten()[row]
        values = (codes.float() - zero) * (scale * factor)
    else:
        table = found.table.float().view(-1, 2**scheme.bits)
        values = table[row if len(table) > 1 else torch.zeros_like(row), codes]
        values = (values if scale is None else values * scale) * factor
    return values.clamp(-_LIMIT, _LIMIT)
