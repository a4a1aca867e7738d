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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantdm.quantizers import log2, shared
from quantdm.quantizers.packing import PLANE_WIDTHS, pack_codes, packed_size, unpack_codes
from quantdm.quantizers.rows import row_layout
from quantdm.schemes import Scheme

KERNEL = "quantdm.quantizers.fused_kernel"
BLOCKS = (1024, 512, 256, 128, 64, 32, 16)  # columns that one program decodes
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
    block = _block(columns.shape[1], scheme.bits, columns.numel())
    if not wanted or not columns.is_cuda or columns.stride(1) != 1 or block is None:
        return False
    if torch.cuda.is_current_stream_capturing() and columns.device not in _asked:
        return False  # asking copies results to the processor, which a capture does not allow
    if not _works(columns.device):
        return False
    _launch(columns, scheme, tensors, limit, block)
    return True


def _block(columns: int, bits: int, count: int) -> int | None:
    """Return how many columns a program decodes: few lanes idle, and at most one seam of a plane among them."""
    least = packed_size(count, bits) // bits * min(PLANE_WIDTHS[bits])
    fitting = [block for block in BLOCKS if block <= least]
    return min(fitting, key=lambda block: -(-columns // block) * (block + 32), default=None)


def _launch(columns: Tensor, scheme: Scheme, tensors: Mapping[str, Tensor], limit: float, block: int) -> None:
    lines, width = columns.shape
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
        wrong = [label for label in _EXAMPLES if not _is_right(Scheme.parse(label), device)]
    except Exception as error:  # a compiler that is missing, a device that it does not know: it raises what it likes
        _log.warning("%s: the decoding kernel cannot be used (%.120s); it goes on without", device, str(error).strip())
        return False
    if wrong:
        _log.warning("%s: the decoding kernel is wrong for %s; it goes on without", device, ", ".join(wrong))
    return not wrong


_EXAMPLES = ("uniform-channel-3-symmetric", "uniform-group32-5", "kmeans-channel-4", "kmeans-tensor-7-int8")


def _is_right(scheme: Scheme, device: torch.device) -> bool:
    """Whether random codes and parameters decode to what plain arithmetic gives, in a part of a wider matrix."""
    lines, width, k = 5, 96, 2**scheme.bits
    rng = torch.Generator().manual_seed(0)
    rows, groups, _ = row_layout(lines, width, scheme)
    codes = torch.randint(k, (lines * width,), generator=rng, dtype=torch.uint8)
    tensors: dict[str, Any] = {"codes": pack_codes(codes, scheme.bits), "factor": torch.tensor([0.25])}
    tensors["scale"] = torch.rand(rows, groups, generator=rng).half()
    tensors["zero_point"] = torch.randint(k, (rows, groups), generator=rng, dtype=torch.int16)
    tensors["codebook"] = torch.randint(-127, 128, (rows, groups, k), generator=rng, dtype=torch.int8)
    if scheme.symmetric or scheme.method != "uniform":
        del tensors["zero_point"]
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    out = torch.full((lines, 2 * width), torch.nan, device=device)
    block = _block(width, scheme.bits, lines * width)
    assert block is not None
    _launch(out[:, width:], scheme, tensors, 1e4, block)
    return torch.equal(out[:, width:].cpu(), _expected({n: t.cpu() for n, t in tensors.items()}, scheme, lines, width))


def _expected(tensors: Mapping[str, Tensor], scheme: Scheme, lines: int, width: int) -> Tensor:
    rows, groups, _ = row_layout(lines, width, scheme)
    codes = unpack_codes(tensors["codes"], scheme.bits, lines * width).long().view(rows, groups, -1)
    scale = tensors["scale"].float()[:, :, None]
    if scheme.method == "kmeans":
        values = (tensors["codebook"].float() * scale * tensors["factor"]).gather(2, codes)
    else:
        zero = tensors["zero_point"].float()[:, :, None] if "zero_point" in tensors else 2 ** (scheme.bits - 1)
        values = (codes - zero) * (scale * tensors["factor"])
    return values.view(lines, width)
