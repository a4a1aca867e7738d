"""Second moments of a layer's inputs: what calibration knows about how much each weight matters.

For a layer y = W x the expected squared error of the output is sum over rows of (w - w_hat) E[x x^T] (w - w_hat)^T.
Its diagonal E[x^2] is the importance of a column of the weight: the error when inputs are uncorrelated.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantdm.errors import QuantDMError

ROWS = 1024  # of a matrix that is copied, at a time
LEAST_IMPORTANCE = 1e-6  # of the mean: a column that calibration never saw used still keeps its sign and size


def _keep() -> None:
    """Let go of nothing: the memory is no file's."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments `second` [G, n, n] float32 of the inputs of one layer, averaged over `count` input vectors.

    G is the number of convolution groups (1 for linear layers) and n the number of weights per output channel, in the
    order of `weight.reshape(C_out, -1)`; for a convolution the input vectors are unfolded patches.
    """

    second: Tensor
    count: int
    let_go: Callable[[], object] = _keep  # of memory that is a file's; it is read again when it is needed

    @property
    def importance(self) -> Tensor:
        """E[x^2] of the input of every column, [G, n]."""
        return self.second.diagonal(dim1=1, dim2=2)

    def part(self, columns: slice) -> "Moments":
        """Return the moments of some of the columns, as one half of a split weight needs them."""
        return replace(self, second=self.second[:, columns, columns])

    def held(self) -> "Moments":
        """Return the moments in memory, of no file: copied some rows at a time, and the file's memory let go of.

        What is read of a file's middle brings all that lies around it into memory as well.
        """
        if self.let_go is _keep:
            return self
        second = torch.empty(self.second.shape, dtype=self.second.dtype)
        for first in range(0, second.shape[1], ROWS):
            second[:, first : first + ROWS] = self.second[:, first : first + ROWS]
            self.let_go()
        return Moments(second, self.count)

    def to(self, device: torch.device) -> "Moments":
        """Return the moments on a device."""
        return replace(self, second=self.second.to(device))

    def importance_of(self, lines: int, device: torch.device | None = None) -> Tensor:
        """Return the importance of every weight of a matrix [lines, n], of mean 1 in each row and nowhere zero."""
        importance = self.importance.to(device).float().clamp_min(0)
        mean = importance.mean(dim=1, keepdim=True)
        share = torch.where(mean > 0, importance / mean.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
        return share.clamp_min(LEAST_IMPORTANCE).repeat_interleave(lines // len(share), dim=0)


def check_moments(moments: Moments, shape: torch.Size | tuple[int, ...], name: str) -> None:
    """Check that moments belong to a weight of this shape.

    Raises:
        QuantDMError: another number of columns or groups, or NaN or infinite moments.
    """
    n = torch.Size(shape[1:]).numel()
    size = tuple(moments.second.shape)
    if len(size) != 3 or size[1:] != (n, n) or size[0] < 1 or shape[0] % size[0]:
        raise QuantDMError(f"{name}: got moments {size}, expected (conv groups, {n}, {n}) for a weight {tuple(shape)}")
    if not bool(torch.isfinite(moments.importance).all()):
        raise QuantDMError(f"{name}: got NaN or infinite moments, expected finite ones; calibrate in float32 or bf16")
