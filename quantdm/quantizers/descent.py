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
    used = diagonal > 0
    step = torch.where(used, 1 / diagonal.clamp_min(torch.finfo(diagonal.dtype).tiny), 0.0)
    # A step is a dozen calls on one column: views that are made once, not in every step, halve the time of all.
    slopes, now, steps, moves = (each.split(1, 1) for each in (gradient, values, step[:, :, None], moved))
    coded, keeps = found.unbind(1), None if bool(used.all()) else ~used[:, :, None]
    for first in range(0, n, BLOCK):
        last = min(first + BLOCK, n)
        for j in range(first, last):
            slope = slopes[j]
            if j > first:
                slope = torch.baddbmm(slope, error.second[:, first:j, j].unsqueeze(1), moved[:, : j - first])
            target = now[j] - slope * steps[j]
            kept, code = tables.nearest(target.reshape(tables.lines, -1), None if group is None else group[:, j])
            kept, code = kept.view(G, 1, -1), code.view(G, -1)
            if keeps is not None:
                kept = torch.where(keeps[:, j : j + 1], now[j], kept)
                code = torch.where(keeps[:, j], coded[j], code.to(torch.uint8))
            torch.sub(kept, now[j], out=moves[j - first])
            now[j].copy_(kept)
            coded[j].copy_(code)
        if last < n:
            share = error.second[:, first:last, last:].transpose(1, 2)
            gradient[:, last:] = torch.baddbmm(gradient[:, last:], share, moved[:, : last - first])
    return values.transpose(1, 2).reshape(C, n), found.transpose(1, 2).reshape(C, n)
