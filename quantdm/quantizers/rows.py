"""Rows: how a weight matrix falls into the pieces that share one scale or codebook.

A weight [C_out, C_in/groups, *kernel], or one half of it, is a matrix [C, n]: one line per output channel. Its
granularity turns it into rows: "tensor" one row of C·n, "channel" C rows of n, "group" rows of `group_size` consecutive
weights of a channel; rows of a "shared" codebook are those of its scales, channels or groups. When the group size does
not divide n, the last group of every channel is shorter.
Parameters of rows have the shape [lines, groups, ...]: [1, 1], [C, 1] or [C, ceil(n / group_size)].
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from quantdm.schemes import Scheme


def row_layout(lines: int, columns: int, scheme: Scheme) -> tuple[int, int, int]:
    """Return (lines, groups, length) of the rows of a [lines, columns] matrix; length is that of a full row."""
    if scheme.granularity == "tensor":
        return 1, 1, lines * columns
    if scheme.group_size is None or scheme.group_size >= columns:
        return lines, 1, columns
    return lines, -(-columns // scheme.group_size), scheme.group_size


def row_blocks(matrix: Tensor, scheme: Scheme) -> list[Tensor]:
    """View a matrix [C, n] as blocks [lines, groups, length] of equal rows: one, or two when the last group is shorter.

    Blocks are views wherever the matrix allows it (a contiguous one always does).
    """
    _, groups, length = row_layout(matrix.shape[0], matrix.shape[1], scheme)
    if scheme.granularity == "tensor":
        return [matrix.reshape(1, 1, -1)]
    full = matrix.shape[1] // length
    blocks = [matrix[:, : full * length].unflatten(1, (full, length))]
    return blocks if full == groups else [*blocks, matrix[:, full * length :].unsqueeze(1)]


def pieces(lines: int, length: int, budget: int) -> Iterator[tuple[slice, slice]]:
    """Yield (lines, columns) of pieces of a [lines, length] array with at most about `budget` elements each."""
    if length > budget:
        for line in range(lines):
            for first in range(0, length, budget):
                yield slice(line, line + 1), slice(first, min(first + budget, length))
    else:
        step = budget // max(length, 1)
        for first in range(0, lines, step):
            yield slice(first, min(first + step, lines)), slice(0, length)


def block_pieces(shape: torch.Size, budget: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield indices (lines, groups, columns) of pieces of a block [lines, groups, length]; groups are never parted."""
    lines, groups, length = shape
    if groups == 1:
        for part, columns in pieces(lines, length, budget):
            yield part, slice(0, 1), columns
    else:
        step = max(budget // (groups * length), 1)
        for first in range(0, lines, step):
            yield slice(first, min(first + step, lines)), slice(0, groups), slice(0, length)


def piece_budget(device: torch.device, cpu: int = 2**15, cuda: int = 2**24) -> int:
    """Return how many elements to work on at a time: what stays in cache on a CPU, what fills a GPU."""
    return cpu if device.type == "cpu" else cuda
