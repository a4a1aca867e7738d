"""The exact objective of calibrated quantization: the expected squared error of a layer's output.

For y = W x it is, row by row, (w_hat - w) H (w_hat - w)^T with H = E[x x^T]; a convolution has one H per conv group.
"""

import torch
from torch import Tensor


class OutputError:
    """The objective of one weight matrix [C, n] under second moments [G, n, n] of its inputs; H may be singular."""

    def __init__(self, matrix: Tensor, second: Tensor) -> None:
        self.matrix = matrix
        self.second = second.to(matrix.dtype)

    def times_h(self, rows: Tensor) -> Tensor:
        """Return rows [C, n] times H."""
        groups, n, _ = self.second.shape
        return torch.bmm(rows.reshape(groups, -1, n), self.second).view(rows.shape)

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
