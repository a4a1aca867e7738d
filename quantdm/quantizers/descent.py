"""Coordinate descent on codes: every weight in turn takes the entry that is best while all others stay.

With g = (w_hat - w) H, weight j alone is best at w_hat_j - g_j / H_jj, and the objective is a parabola there, so the
entry nearest to that is the best one and no step raises the objective (QuantEase, Behdin et al., 2023; CDQuant,
Nair and Suggala, 2024). Rows do not touch each other: a column of all of them is one step.
"""

import torch
from torch import Tensor

from quantdm.quantizers.columns import BLOCK, ColumnTables
from quantdm.quantizers.objective import OutputError


def descend(error: OutputError, decoded: Tensor, codes: Tensor, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Sweep once over all columns; return the weights [C, n] and their uint8 codes [C, n].

    `table` [lines, groups, k] ascends or descends; a group is `length` consecutive columns. Columns whose input is
    always zero keep their codes.
    """
    G, n, _ = error.second.shape
    C = len(decoded)
    tables = ColumnTables(table)
    group = (torch.arange(n, device=decoded.device) // length).expand(G, n) if table.shape[1] > 1 else None

    def by_column(rows: Tensor) -> Tensor:
        return rows.reshape(G, C // G, n).transpose(1, 2).contiguous()

    gradient, values, found = (by_column(rows) for rows in (error.gradient(decoded), decoded, codes))
    moved = torch.zeros(G, BLOCK, C // G, dtype=decoded.dtype, device=decoded.device)
    diagonal = error.second.diagonal(dim1=1, dim2=2)
    step = torch.where(diagonal > 0, 1 / diagonal.clamp_min(torch.finfo(diagonal.dtype).tiny), 0.0)
    for first in range(0, n, BLOCK):
        last = min(first + BLOCK, n)
        for j in range(first, last):
            slope = gradient[:, j : j + 1]
            if j > first:
                slope = torch.baddbmm(slope, error.second[:, first:j, j].unsqueeze(1), moved[:, : j - first])
            target = values[:, j : j + 1] - slope * step[:, j, None, None]
            kept, code = tables.nearest(target.reshape(tables.lines, -1), None if group is None else group[:, j])
            used = (diagonal[:, j] > 0)[:, None]
            kept = torch.where(used, kept.view(G, -1), values[:, j])
            moved[:, j - first] = kept - values[:, j]
            values[:, j] = kept
            found[:, j] = torch.where(used, code.view(G, -1).to(torch.uint8), found[:, j])
        if last < n:
            share = error.second[:, first:last, last:].transpose(1, 2)
            gradient[:, last:] = torch.baddbmm(gradient[:, last:], share, moved[:, : last - first])
    return values.transpose(1, 2).reshape(C, n), found.transpose(1, 2).reshape(C, n)
