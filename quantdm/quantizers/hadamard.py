"""Regular Hadamard rotations: orthogonal mixing of channels block by block, which spreads what a few of them carry.

Built from R4 = J/2 - I (J all ones): symmetric, orthogonal, with equal row sums. Its Kronecker powers keep that, so no
column gathers the mean of a row, as the first one of Sylvester's matrices does (QuaRot, arXiv 2404.00456, uses those;
regular matrices: ConvRot, arXiv 2512.03673).
"""

from functools import lru_cache

import torch
from torch import Tensor

MAX_BLOCK = 256


def block_size(channels: int) -> int:
    """Return the block of a rotation: the largest power of four up to 256 that divides the channels; 1: no rotation."""
    size = MAX_BLOCK
    while channels % size:
        size //= 4
    return size


@lru_cache(maxsize=32)
def regular_hadamard(size: int) -> Tensor:
    """Return the regular Hadamard matrix [size, size] in float64, normalised: symmetric and its own inverse.

    Args:
        size: a power of four.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    four = torch.full((4, 4), 0.5, dtype=torch.float64) - torch.eye(4, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix


def rotate(x: Tensor, dim: int = -1) -> Tensor:
    """Rotate the channels of `x` along `dim` block by block; doing it twice gives `x` again.

    Computed in float32, or in float64 if `x` is; returned in the dtype of `x`.
    """
    size = block_size(x.shape[dim])
    if size == 1:
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    last = wide.movedim(dim, -1)
    matrix = regular_hadamard(size).to(device=x.device, dtype=wide.dtype)
    mixed = (last.unflatten(-1, (-1, size)) @ matrix).flatten(-2)
    return mixed.movedim(-1, dim).to(x.dtype)
