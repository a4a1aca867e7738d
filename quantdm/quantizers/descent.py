"""Coordinate descent on codes: every weight in turn takes the entry that is best while all others stay.

With g = (w_hat - w) H, weight j alone is best at w_hat_j - g_j / H_jj, and the objective is a parabola there, so the
entry nearest to that is the best one and no step raises the objective (QuantEase, Behdin et al., 2023; CDQuant,
Nair and Suggala, 2024). Rows do not touch each other: a column of all of them is one step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantdm.quantizers.columns import BLOCK, Stack
from quantdm.quantizers.objective import OutputError


def descend(
    error: OutputError, decoded: Sequence[Tensor], codes: Sequence[Tensor], tables: Sequence[Tensor], length: int
) -> list[tuple[Tensor, Tensor]]:
    """Sweep once over all columns of weights [C, n] with uint8 codes [C, n]; return both of each.

    Tables [lines, groups, k], one for each, ascend or descend and have as many groups; a group is `length` consecutive
    columns. Columns whose input is always zero keep their codes.
    """
    G, n, _ = error.second.shape
    stack = Stack(tables, len(error.matrix), G, length)
    group = stack.group_of(torch.arange(n, device=error.matrix.device).expand(G, n))
    # the move of a column takes the place of its gradient, which nothing asks for afterwards
    gradient = stack.by_column([error.gradient(each) for each in decoded])
    values, found = stack.by_column(decoded), stack.by_column(codes)
    diagonal = error.second.diagonal(dim1=1, dim2=2)
    used = diagonal > 0
    step = torch.where(used, 1 / diagonal.clamp_min(torch.finfo(diagonal.dtype).tiny), 0.0)
    # A step is a dozen calls on one column: views that are made once, not in every step, halve the time of all.
    slopes, now, steps = (rows.split(1, 1) for rows in (gradient, values, step[:, :, None]))
    coded, keeps = found.unbind(1), None if bool(used.all()) else ~used[:, :, None]
    for first in range(0, n, BLOCK):
        last = min(first + BLOCK, n)
        if first:
            share = error.second[:, :first, first:last].transpose(1, 2)
            gradient[:, first:last] = torch.baddbmm(gradient[:, first:last], share, gradient[:, :first])
        for j in range(first, last):
            slope = slopes[j]
            if j > first:
                slope = torch.baddbmm(slope, error.second[:, first:j, j].unsqueeze(1), gradient[:, first:j])
            target = now[j] - slope * steps[j]
            kept, code = stack.nearest(target.reshape(stack.lines, -1), None if group is None else group[:, j])
            kept, code = kept.view(G, 1, -1), code.view(G, -1)
            if keeps is not None:
                kept = torch.where(keeps[:, j : j + 1], now[j], kept)
                code = torch.where(keeps[:, j], coded[j], code.to(torch.uint8))
            torch.sub(kept, now[j], out=slopes[j])
            now[j].copy_(kept)
            coded[j].copy_(code)
    return list(zip(stack.by_table(values), stack.by_table(found), strict=True))
