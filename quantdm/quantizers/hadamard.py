"""Regular Hadamard rotations: orthogonal mixing of channels block by block, which spreads what a few of them carry.

Built from R4 = J/2 - I (J all ones): symmetric, orthogonal, with equal row sums. Its Kronecker powers keep that, so no
column gathers the mean of a row, as the first one of Sylvester's matrices does (QuaRot, arXiv 2404.00456, uses those;
regular matrices: ConvRot, arXiv 2512.03673).
"""

import torch
from torch import Tensor

from quantdm.quantizers.moments import Moments

MAX_BLOCK = 256


def block_size(channels: int) -> int:
    """Return the block of a rotation: the largest power of four up to 256 that divides the channels; 1: no rotation."""
    size = MAX_BLOCK
    while channels % size:
        size //= 4
    return size


def rotate(x: Tensor, dim: int = -1, *, seam: int | None = None) -> Tensor:
    """Rotate the channels of `x` along `dim` block by block; doing it twice gives `x` again.

    Computed in float32, or in float64 if `x` is, by sums of four in a fixed order: the same bits on every machine.
    Returned in the dtype of `x`.

    Args:
        x: any float tensor.
        dim: that of the channels.
        seam: the channel at which a long-skip concatenation is seamed; its halves are rotated each by themselves.
    """
    if seam is not None:
        return torch.cat([rotate(half, dim) for half in x.tensor_split([seam], dim)], dim)
    size = block_size(x.shape[dim])
    y = x.movedim(dim, -1)
    y = y if y.dtype == torch.float64 else y.float()
    blocks, stride = y.unflatten(-1, (-1, size)), 1
    while stride < size:  # R4 = J/2 - I along every digit of the channel's number in base four
        a, b, c, d = blocks.unflatten(-1, (-1, 4, stride)).unbind(-2)
        half = ((a + b) + (c + d)) * 0.5
        blocks = torch.stack((half - a, half - b, half - c, half - d), dim=-2).flatten(-3)
        stride *= 4
    return blocks.flatten(-2).movedim(-1, dim).to(x.dtype)


def rotate_moments(moments: Moments, channels: int, *, seam: int | None = None) -> Moments:
    """Return the second moments of the inputs of a layer whose channels are rotated: R H R.

    Args:
        moments: of `channels` input channels with the positions of a kernel each, as a flattened weight has them.
        channels: input channels of one convolution group.
        seam: as in `rotate`.
    """
    groups, n, _ = moments.second.shape
    second = moments.second.view(groups, channels, n // channels, channels, n // channels)
    second = rotate(rotate(second, 1, seam=seam), 3, seam=seam)
    return Moments(second.reshape(groups, n, n), moments.count)
