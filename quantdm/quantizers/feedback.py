"""Error feedback: quantize the columns of a weight in turn and let the later ones make up for the errors of the former.

The output error of one row is e H e^T with e = w - w_hat and H = E[x x^T]. With H = R R^T, R upper triangular and
U = R / diag(R) per column, it is sum_j R_jj^2 (e_j + sum_(i<j) e_i U_ij)^2. So column j takes the entry of its grid
nearest to w_j + sum_(i<j) e_i U_ij: the choice of OBQ and GPTQ (Frantar et al., 2022) in the form of LDLQ (Chee et al.,
2023), which needs no inverse. It works with any grid, because the grid only answers which entry is nearest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from quantdm.errors import QuantDMError
from quantdm.quantizers.columns import BLOCK, Stack
from quantdm.quantizers.moments import ROWS, Moments

DAMPING = 0.01  # of the mean diagonal, raised tenfold until the factorization succeeds


@dataclass(frozen=True, eq=False)
class InputFactor:
    """The unit upper triangular `factor` U [G, n, n] of the second moments, columns in the `order` [G, n]."""

    order: Tensor
    factor: Tensor


def factorize(moments: Moments, name: str) -> InputFactor:
    """Factorize second moments, the columns of the largest inputs first: they have the others left to correct them.

    Inputs that are always zero are taken as independent of the others; then their columns are simply rounded.

    Raises:
        QuantDMError: not a matrix of second moments, however much it is damped.
    """
    diagonal = moments.second.diagonal(dim1=1, dim2=2).float()
    mean = diagonal.mean(dim=1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    diagonal = torch.where(diagonal > 0, diagonal, mean)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    backwards = order.flip(1)
    damped, damping = diagonal.gather(1, backwards), DAMPING
    place = torch.empty(moments.second.shape, dtype=torch.float32, device=diagonal.device)
    while damping <= 10:
        damped += damping * mean
        matrix = _permuted(moments.second, backwards, place.mT)
        matrix.diagonal(dim1=1, dim2=2).copy_(damped)
        lower, info = _cholesky_(matrix)
        if not bool(info.any()):
            return InputFactor(order, _unit_upper_(lower.mT))
        damping *= 10
    raise QuantDMError(f"{name}: got moments that are not positive, expected E[x x^T]; calibrate in float32 or bf16")


def _permuted(second: Tensor, order: Tensor, out: Tensor) -> Tensor:
    """Write moments [G, n, n] with rows and columns in an order [G, n] to `out`, some rows at a time."""
    for g in range(len(second)):
        for first in range(0, second.shape[1], ROWS):
            rows = order[g, first : first + ROWS]
            out[g, first : first + ROWS] = second[g, rows][:, order[g]]
    return out


def _cholesky_(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Factorize matrices [G, n, n] whose columns are contiguous, on the CPU in their own memory: LAPACK's order."""
    if matrix.device.type != "cpu":
        return torch.linalg.cholesky_ex(matrix)
    info = torch.empty(len(matrix), dtype=torch.int32)
    return torch.linalg.cholesky_ex(matrix, out=(matrix, info))


def _unit_upper_(upper: Tensor) -> Tensor:
    """Turn L^T [G, n, n], L a Cholesky factor of columns from the last to the first, into the unit upper one in place.

    U_ij = L_ab / L_bb with a = n - 1 - i, b = n - 1 - j: a reflection in the other diagonal, tile by tile. Of the
    widest layers a second matrix would be half a gigabyte.
    """
    upper = upper.contiguous()
    n = upper.shape[1]
    scale = upper.diagonal(dim1=1, dim2=2).flip(1)[:, None].clone()
    edges = sorted({edge for first in range(0, n, ROWS) for edge in (first, n - first)})
    tiles = [slice(*pair) for pair in pairwise(edges)]
    for a in range(len(tiles)):
        for b in range(a, len(tiles) - a):  # below the diagonal there are zeros
            tile, mirrored = upper[:, tiles[a], tiles[b]], upper[:, tiles[-1 - b], tiles[-1 - a]]
            turned = tile.flip(1, 2).mT
            tile.copy_(mirrored.flip(1, 2).mT)
            mirrored.copy_(turned)
    for first in range(0, n, ROWS):
        upper[:, first : first + ROWS] /= scale
    return upper


def feedback_codes(matrix: Tensor, tables: Sequence[Tensor], length: int, factor: InputFactor) -> list[Tensor]:
    """Return the uint8 codes [C, n] of a weight matrix [C, n] under each of several tables [lines, groups, k].

    Tables ascend or descend and have as many groups each; lines are C or 1; a group is `length` consecutive columns
    (all of them where there is one group).
    """
    G, n = factor.order.shape
    stack = Stack(tables, len(matrix), G, length)
    order = factor.order[:, :, None]
    columns = matrix.view(G, -1, n).transpose(1, 2).gather(1, order.expand(-1, -1, stack.of_each))
    columns = columns if len(tables) == 1 else columns.repeat(1, 1, len(tables))
    group = stack.group_of(factor.order)
    error = torch.empty_like(columns)
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=matrix.device)
    whole, errors, coded = columns.unbind(1), error.unbind(1), codes.unbind(1)  # views that every step would make
    for first in range(0, n, BLOCK):
        last = min(first + BLOCK, n)
        wanted = columns[:, first:last]
        if first:
            wanted = torch.baddbmm(wanted, factor.factor[:, :first, first:last].transpose(1, 2), error[:, :first])
        for j, target in enumerate(wanted.split(1, 1), first):
            if j > first:
                share = factor.factor[:, first:j, j].unsqueeze(1)
                target = torch.baddbmm(target, share, error[:, first:j])
            kept, code = stack.nearest(target.reshape(stack.lines, -1), None if group is None else group[:, j])
            coded[j].copy_(code.view(G, -1))
            torch.sub(whole[j], kept.view(G, -1), out=errors[j])
    return stack.by_table(torch.empty_like(codes).scatter_(1, order.expand_as(codes), codes))
