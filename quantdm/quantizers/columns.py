"""The entry nearest to every weight of one column, under tables that may differ by row and by group."""

import torch
from torch import Tensor

BLOCK = 128  # columns whose errors are handed on together


class ColumnTables:
    """Tables [lines, groups, k] of a matrix, ascending or descending, ready to be asked column by column."""

    def __init__(self, table: Tensor) -> None:
        down = table[:, :, 0] > table[:, :, -1]
        self.lines = len(table)
        self.flip = (down.long() * (table.shape[2] - 1)).t().contiguous()  # only tables of 2^b entries descend
        table = torch.where(down[:, :, None], table.flip(2), table)
        self.middle = ((table[:, :, 1:] + table[:, :, :-1]) / 2).transpose(0, 1).contiguous()  # [groups, lines, k - 1]
        self.values = table.transpose(0, 1).contiguous()
        self._first = self._of(0)

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
            at, entries, turned = self.middle[of_line, line], self.values[of_line, line], self.flip[of_line, line, None]
        codes = torch.searchsorted(at, target.contiguous())
        return entries.gather(1, codes), codes ^ turned

    def _of(self, group: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `nearest` needs of one group of columns."""
        return self.middle[group], self.values[group], self.flip[group][:, None]
