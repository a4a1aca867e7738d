"""Sums of outputs and errors, and the least-squares fit of slope, bias and rest from them."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from quantdm.correction.record import MIN_K

# The slope is used only when it is significant (the pixels are not independent, hence also the share of variance).
MIN_T_VALUE = 3.0
MIN_R2 = 0.05


class Moments:
    """Sums of V variables and of their products per channel, in float64.

    They count from each channel's first value: variance is a difference of sums, and of values that are nearly the same
    it would be rounding alone, positive or negative.
    """

    def __init__(self) -> None:
        self.count = 0
        self._origin: torch.Tensor | None = None
        self._first = torch.zeros(())
        self._second = torch.zeros(())

    def add(self, *variables: torch.Tensor) -> None:
        """Add V tensors of equal shape [N, C, ...]."""
        x = torch.stack([v.double().transpose(0, 1).flatten(1) for v in variables])
        self.count += x.shape[2]
        if self._origin is None:
            self._origin = x[:, :, :1].clone()
        x = x - self._origin
        self._first = self._first + x.sum(dim=2)
        self._second = self._second + torch.einsum("vcn,wcn->vwc", x, x)

    @property
    def mean(self) -> torch.Tensor:
        """Means [V, C]."""
        assert self._origin is not None
        return self._origin[:, :, 0] + self._first / self.count

    @property
    def channel_cov(self) -> torch.Tensor:
        """Covariances within each channel, [V, V, C]."""
        mean = self._first / self.count
        return self._second / self.count - mean[:, None] * mean[None, :]

    @property
    def cov(self) -> torch.Tensor:
        """Covariances within each channel, summed over channels, [V, V]."""
        return self.channel_cov.sum(dim=2)


@dataclass(frozen=True)
class NoiseFit:
    """The noise of one level: slope (k: 0 if not significant), intercepts per channel, std of the rest.

    Standard errors are those of independent values: those of neighbouring pixels are larger.
    """

    k: float
    slope: float
    k_se: float
    r2: float
    bias: np.ndarray
    shift: np.ndarray
    q: float
    q_all: float
    bias_se: float
    q_se: float


def fit_noise(mean: np.ndarray, cov: np.ndarray, count: int) -> NoiseFit:
    """Fit error = k output + bias_c + rest by least squares.

    k counts when |k| / se > 3, R^2 > 0.05 and k > -0.5; else it is 0 and the rest is all of the error but its mean.

    Args:
        mean: of (output, error) per channel, [2, C].
        cov: their covariances, summed over channels, [2, 2].
        count: values per channel.
    """
    channels = mean.shape[1]
    freedom = max(count * channels - channels - 1, 1)
    s = cov * count
    s_mm, s_dd, s_md = max(s[0, 0], 0.0), max(s[1, 1], 0.0), s[0, 1]
    k, r2, k_se = 0.0, 0.0, 0.0
    if s_mm > 0 and s_dd > 0:
        k = s_md / s_mm
        r2 = s_md**2 / (s_mm * s_dd)
        k_se = math.sqrt(max(s_dd - k * s_md, 0.0) / freedom / s_mm)
    slope = k
    if not (abs(k) > MIN_T_VALUE * k_se and r2 > MIN_R2 and k > MIN_K):
        k = 0.0
    q = math.sqrt(max(s_dd - 2 * k * s_md + k**2 * s_mm, 0.0) / freedom)
    bias_se = math.hypot(q / math.sqrt(count), float(np.abs(mean[0]).max()) * k_se if k else 0.0)
    return NoiseFit(
        k=k,
        slope=slope,
        k_se=k_se,
        r2=r2,
        bias=mean[1] - k * mean[0],
        shift=mean[1],
        q=q,
        q_all=math.sqrt(s_dd / freedom),
        bias_se=bias_se,
        q_se=q / math.sqrt(2 * freedom),
    )
