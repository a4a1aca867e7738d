"""Equalisation between input channels: what makes some of them large moves from the activations into the weight.

    y = sum over c of (x_c / s_c)·(s_c w_c),    s_c = max|x_c|^a / max|w_c|^(1 - a)

(SmoothQuant, arXiv 2211.10438, equation 4). Here s is a power of two, kept as its exponent: dividing and multiplying
round nothing, so an equalised layer in full precision is the plain one.
"""

import torch
from torch import Tensor

from quantdm.quantizers.moments import Moments

MOST = 12  # of an exponent, either way: 2^12 is a range that no remedy would leave to the channels
_NONE = ord("m")  # the letter of 2^0


def exponents_of(inputs: Tensor, weight: Tensor, share: float) -> Tensor:
    """Return the exponents of s, int8 [C]; their median is zero, and so is that of a channel that carries nothing.

    Args:
        inputs: how far every input channel reaches, [C], 0 or more.
        weight: [C_out, C, *kernel].
        share: a, the part of the activations' spread that moves into the weight: 0 to 1.
    """
    reach = weight.detach().double().abs().amax([dim for dim in range(weight.dim()) if dim != 1])
    inputs = inputs.double().to(reach.device)
    used = (inputs > 0) & (reach > 0)
    logs = torch.zeros_like(reach)
    logs[used] = share * inputs[used].log2() - (1 - share) * reach[used].log2()
    if used.any():
        logs[used] -= logs[used].median()
    return logs.round().clamp(-MOST, MOST).to(torch.int8)


def exponents_from_moments(moments: Moments, weight: Tensor, share: float) -> Tensor:
    """Return `exponents_of` a weight whose input channels reach as far as the root of E[x^2] over kernel and groups."""
    channels = weight.shape[1]
    power = moments.importance.double().clamp_min(0).view(len(moments.second), channels, -1).mean(dim=(0, 2))
    return exponents_of(power.sqrt(), weight, share)


def shifted(x: Tensor, exponents: Tensor, dim: int, sign: int) -> Tensor:
    """Return x·2^(sign·exponent) channel by channel in float32, or in float64 if x is; exact.

    Args:
        x: any float tensor, whose channels along `dim` are those of the exponents, once for every convolution group.
        exponents: int8 [C].
        dim: that of the channels.
        sign: 1 or -1.
    """
    dim %= x.dim()
    y = x if x.dtype == torch.float64 else x.float()
    powers = powers_of(exponents.to(x.device), x.shape[dim], sign)
    return y * powers.view([-1 if at == dim else 1 for at in range(x.dim())])


def powers_of(exponents: Tensor, channels: int, sign: int) -> Tensor:
    """Return 2^(sign·exponent) for every channel, once for every convolution group, float32 [channels]."""
    powers = ((exponents.to(torch.int32) * sign + 127) << 23).view(torch.float32)  # the bits of 2^k
    return powers.repeat(channels // len(powers))


def equalise_moments(moments: Moments, exponents: Tensor) -> Moments:
    """Return the second moments of x / s."""
    positions = moments.second.shape[1] // len(exponents)
    own = exponents.repeat_interleave(positions)
    return Moments(shifted(shifted(moments.second, own, 1, -1), own, 2, -1), moments.count)


def to_letters(exponents: Tensor) -> str:
    """Return exponents as one letter a channel: m for 1, n for 2, l for 1/2."""
    return "".join(chr(_NONE + k) for k in exponents.tolist())


def from_letters(text: str) -> Tensor:
    """Return the exponents that `to_letters` wrote, int8 [C]."""
    return torch.tensor([ord(letter) - _NONE for letter in text], dtype=torch.int8)
