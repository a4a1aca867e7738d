"""The entry nearest to every weight of one column, under tables that may differ by row and by group.

Going through a matrix column by column is a chain of small operations: of a few hundred rows, calling them takes longer
than their work. Rows do not touch each other, so several tables of one matrix stand one below the other in a `Stack`,
and a column of all of them is one step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 64  # columns whose errors are handed on together
STACKED_ROWS, STACKED_WEIGHTS = 4096, 2**22  # of a stack: beyond, work takes longer than calls, and memory counts
NARROW = 16  # entries; tables of more are not stacked with these: all become as wide as the widest


class Stack:
    """Tables [lines, groups, k] of one matrix [C, n] of some convolution groups, to be asked column by column.

    Tables ascend or descend, lines are C or 1. All have as many groups, each of `length` consecutive columns. What is
    stacked has the rows of a convolution group together: [G, n, tables * C / G].
    """

    def __init__(self, tables: Sequence[Tensor], rows: int, groups: int, length: int) -> None:
        self.G, self.of_each = groups, rows // groups
        self.length = length if tables[0].shape[1] > 1 else None
        width = max(table.shape[2] for table in tables)
        alone = len(tables) == 1 and len(tables[0]) == 1  # all rows ask one table
        laid = [[part if alone else self._of_rows(part) for part in _ascending(table, width)] for table in tables]
        stacked = [torch.cat(parts, dim=-3).view(-1, *parts[0].shape[-2:]) for parts in zip(*laid, strict=True)]
        self.lines = len(stacked[0])
        by_group = (part.transpose(0, 1).contiguous() for part in stacked)
        self.middle, self.values, self.flip = by_group  # [groups, lines, ...]
        self._first = self._of(0)

    def _of_rows(self, part: Tensor) -> Tensor:
        """Return what [lines, groups, ...] has for the rows of every convolution group: [G, C / G, groups, ...]."""
        return part.expand(self.G * self.of_each, -1, -1).view(self.G, self.of_each, *part.shape[1:])

    def by_column(self, matrices: Sequence[Tensor]) -> Tensor:
        """Stack matrices [C, n], one for every table, and turn them: [G, n, tables * C / G]."""
        turned = [rows.view(self.G, self.of_each, -1).transpose(1, 2) for rows in matrices]
        return torch.cat(turned, dim=2)

    def by_table(self, stacked: Tensor) -> list[Tensor]:
        """Undo `by_column`."""
        parts = stacked.split(self.of_each, dim=2)
        return [part.transpose(1, 2).reshape(self.G * self.of_each, -1) for part in parts]

    def group_of(self, column: Tensor) -> Tensor | None:
        """Return in which of the groups columns are; None: there is one group only."""
        return None if self.length is None else column // self.length

    def nearest(self, target: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the entries nearest to `target` [lines, count], and their codes.

        `group` [G] is the column's group of weights in each convolution group (None: there is one group); they differ
        where the order of the columns does.
        """
        if group is None or len(self.values) == 1:
            at, entries, turned = self._first
        elif len(group) == 1:
            at, entries, turned = self._of(group[0])
        else:  # each convolution group has an order of its own
            line = torch.arange(self.lines, device=group.device)
            of_line = group.repeat_interleave(self.lines // len(group))
            at, entries, turned = self.middle[of_line, line], self.values[of_line, line], self.flip[of_line, line]
        codes = torch.searchsorted(at, target.contiguous())
        return entries.gather(1, codes), codes ^ turned

    def _of(self, group: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `nearest` needs of one group of columns."""
        return self.middle[group], self.values[group], self.flip[group]


def _ascending(table: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the midpoints, entries and turns of a table [lines, groups, k], ascending and `width` entries wide."""
    down = table[:, :, :1] > table[:, :, -1:]
    table = torch.where(down, table.flip(2), table)
    middle, more = (table[:, :, 1:] + table[:, :, :-1]) / 2, (0, width - table.shape[2])
    flip = down.long() * (table.shape[2] - 1)  # only tables of 2^b entries descend
    # nothing lies beyond an infinite midpoint
    return torch.nn.functional.pad(middle, more, value=torch.inf), torch.nn.functional.pad(table, more), flip
