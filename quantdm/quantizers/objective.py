"""The exact objective of calibrated quantization: the expected squared error of a layer's output.

For y = W x it is, row by row, (w_hat - w) H (w_hat - w)^T with H = E[x x^T]; a convolution has one H per conv group.
"""

from typing import Protocol

import torch
from torch import Tensor


class Objective(Protocol):
    """What a quantized weight is judged by, row by row."""

    def of_rows(self, decoded: Tensor) -> Tensor:
        """Return the objective of every row, float64 [C]."""
        ...

    def weigh(self, rows: Tensor) -> Tensor:
        """Return rows [R, n] times H; of several convolution groups times the mean of theirs."""
        ...


class ColumnError:
    """The squared error of a weight matrix [C, n], every column weighted by its E[x^2] or, without, by one."""

    def __init__(self, matrix: Tensor, importance: Tensor | None = None) -> None:
        self.matrix, self.importance = matrix, importance  # [G, n]

    def of_rows(self, decoded: Tensor) -> Tensor:
        """Return the objective of every row, float64 [C]."""
        square = (decoded - self.matrix).square()
        if self.importance is not None:
            square = square * self.importance.repeat_interleave(len(square) // len(self.importance), dim=0)
        return square.sum(dim=1, dtype=torch.float64)

    def weigh(self, rows: Tensor) -> Tensor:
        """Return rows [R, n] times the weights of the columns."""
        return rows if self.importance is None else rows * self.importance.mean(dim=0)


class OutputError:
    """The objective of one weight matrix [C, n] under second moments [G, n, n] of its inputs; H may be singular."""

    def __init__(self, matrix: Tensor, second: Tensor) -> None:
        self.matrix = matrix
        self.second = second.to(matrix.dtype)

    def times_h(self, rows: Tensor) -> Tensor:
        """Return rows [C, n] times H."""
        groups, n, _ = self.second.shape
        return torch.bmm(rows.reshape(groups, -1, n), self.second).view(rows.shape)

    def weigh(self, rows: Tensor) -> Tensor:
        """Return rows [R, n] times H; of several convolution groups times the mean of theirs."""
        return rows @ (self.second[0] if len(self.second) == 1 else self.second.mean(dim=0))

    def gradient(self, decoded: Tensor) -> Tensor:
        """Return (w_hat - w) H [C, n], half the gradient."""
        return self.times_h(decoded - self.matrix)

    def of_rows(self, decoded: Tensor) -> Tensor:
        """Return the objective of every row, float64 [C]."""
        difference = decoded - self.matrix
        return (difference * self.times_h(difference)).sum(dim=1, dtype=torch.float64)

    def curvature(self) -> Tensor:
        """Return H_jj of every weight [C, n]: a view."""
        groups, n, _ = self.second.shape
        diagonal = self.second.diagonal(dim1=1, dim2=2).clamp_min(0)
        return diagonal[:, None].expand(groups, len(self.matrix) // groups, n).reshape(len(self.matrix), n)
