"""Refit tables, scales and zero points to the exact objective while the codes stay.

Decoded weights are linear in what is fitted, w_hat = B theta, so the best theta solves B^T H B theta = B^T H w. It is
found by conjugate gradients, preconditioned by diag(B^T diag(H) B): one product with H per step whatever the number of
entries, every step lowers the objective, and a singular H needs no care (the solution nearest to the start is found).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantdm.quantizers.objective import OutputError

STEPS = 12  # of conjugate gradients at most; tables of rows with 16 entries gain a little more from further ones


@dataclass(frozen=True, eq=False)
class Segments:
    """Which scale or table every weight of a matrix [C, n] belongs to: lines C or 1, groups of `length` columns."""

    lines: int
    groups: int
    length: int

    def total(self, values: Tensor) -> Tensor:
        """Sum values [C, n] over every group: [lines, groups]."""
        if self.groups == 1:
            sums = values.sum(dim=1, keepdim=True)
        else:
            padding = self.groups * self.length - values.shape[1]
            sums = torch.nn.functional.pad(values, (0, padding)).view(len(values), self.groups, -1).sum(dim=2)
        return sums if self.lines > 1 else sums.sum(dim=0, keepdim=True)

    def spread(self, values: Tensor, columns: int) -> Tensor:
        """Give every weight of a row the value [lines, groups] of its group: [lines, n]."""
        return values if self.groups == 1 else values.repeat_interleave(self.length, dim=1)[:, :columns]


@dataclass(frozen=True, eq=False)
class ScaleFit:
    """w_hat = sum over m of theta[line, group, m] * bases[m]: scales, and offsets beside them."""

    bases: tuple[Tensor, ...]
    segments: Segments

    def decode(self, theta: Tensor) -> Tensor:
        """Return the weights [C, n] of theta [lines, groups, m]."""
        columns = self.bases[0].shape[1]
        terms = [self.segments.spread(theta[:, :, m], columns) * basis for m, basis in enumerate(self.bases)]
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    def adjoint(self, slope: Tensor) -> Tensor:
        """Return B^T slope [lines, groups, m]."""
        return torch.stack([self.segments.total(slope * basis) for basis in self.bases], dim=2)

    def weigh(self, curvature: Tensor) -> Tensor:
        """Return the diagonal of B^T diag(curvature) B [lines, groups, m]."""
        return torch.stack([self.segments.total(curvature * basis.square()) for basis in self.bases], dim=2)


@dataclass(frozen=True, eq=False)
class TableFit:
    """w_hat = gain * theta[place]: tables of rows and groups, or one shared table under the scales `gain` [C, n]."""

    place: Tensor
    shape: tuple[int, int, int]
    gain: Tensor | None = None

    def decode(self, theta: Tensor) -> Tensor:
        """Return the weights [C, n] of tables [lines, groups, k]."""
        found = theta.reshape(-1).index_select(0, self.place.view(-1)).view(self.place.shape)
        return found if self.gain is None else found * self.gain

    def adjoint(self, slope: Tensor) -> Tensor:
        """Return B^T slope [lines, groups, k]."""
        return self._sum(slope if self.gain is None else slope * self.gain)

    def weigh(self, curvature: Tensor) -> Tensor:
        """Return the diagonal of B^T diag(curvature) B [lines, groups, k]."""
        return self._sum(curvature if self.gain is None else curvature * self.gain.square())

    def _sum(self, values: Tensor) -> Tensor:
        count = self.shape[0] * self.shape[1] * self.shape[2]
        sums = torch.bincount(self.place.view(-1), values.reshape(-1), count)
        return sums.to(values.dtype).view(self.shape)


def places(codes: Tensor, table: Tensor, length: int) -> TableFit:
    """Return where in tables [lines, groups, k] the entry of every code [C, n] lies."""
    lines, groups, k = table.shape
    place = codes.long().contiguous()
    if lines > 1:
        place += torch.arange(lines, device=codes.device)[:, None] * (groups * k)
    if groups > 1:
        place += torch.arange(codes.shape[1], device=codes.device) // length * k
    return TableFit(place, (lines, groups, k))


def sort_tables(table: Tensor, fit: TableFit) -> tuple[Tensor, Tensor, Tensor]:
    """Return tables [lines, groups, k] in ascending order, that order, and the codes [C, n] of the weights then."""
    order = table.argsort(dim=2, stable=True)
    rank = order.argsort(dim=2).to(torch.uint8).view(-1)
    return table.gather(2, order), order, rank.index_select(0, fit.place.view(-1)).view(fit.place.shape)


def solve(error: OutputError, fit: ScaleFit | TableFit, theta: Tensor, *, steps: int = STEPS) -> Tensor:
    """Return the theta that conjugate gradients reach from the start `theta` [lines, groups, m].

    Lines are solved side by side, each with steps of its own, as many as it has parameters at most: then the solution
    is exact. Parameters that no weight uses keep their value.
    """
    mass = fit.weigh(error.curvature())
    inverse = torch.where(mass > 0, 1 / mass.clamp_min(torch.finfo(mass.dtype).tiny), 0.0)
    residual = -fit.adjoint(error.gradient(fit.decode(theta)))
    ahead = inverse * residual
    direction, size = ahead, _dot(residual, ahead)
    for _ in range(min(steps, theta[0].numel())):
        change = fit.decode(direction)
        pushed = error.times_h(change)
        bend = (change * pushed).sum(dim=1, dtype=torch.float64)[:, None, None]
        if len(theta) == 1:
            bend = bend.sum(dim=0, keepdim=True)
        step = torch.where(bend > 0, size / bend.clamp_min(torch.finfo(torch.float64).tiny), 0.0).to(theta.dtype)
        theta = theta + step * direction
        residual = residual - step * fit.adjoint(pushed)
        ahead = inverse * residual
        after = _dot(residual, ahead)
        share = torch.where(size > 0, after / size.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        direction, size = ahead + share.to(theta.dtype) * direction, after
    return theta


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum(dim=(1, 2), keepdim=True)
