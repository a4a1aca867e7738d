"""Streaming statistics of quantization noise: float64 sums per timestep and channel, then slope, bias and the rest."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from quantdm.correction.record import MIN_K, Correction
from quantdm.correction.variance import log_snr
from quantdm.errors import QuantDMError

# The slope is used only when it is significant (the pixels are not independent, hence also the share of variance).
MIN_T_VALUE = 3.0
MIN_R2 = 0.05
# Values per channel and update that are kept for the robust cross-check of q.
KEPT_VALUES = 512


class Moments:
    """Sums of V variables and of their products per channel, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._first = torch.zeros(())
        self._second = torch.zeros(())

    def add(self, *variables: torch.Tensor) -> None:
        """Add V tensors of equal shape [N, C, ...]."""
        x = torch.stack([v.double().transpose(0, 1).flatten(1) for v in variables])
        self.count += x.shape[2]
        self._first = self._first + x.sum(dim=2)
        self._second = self._second + torch.einsum("vcn,wcn->vwc", x, x)

    @property
    def mean(self) -> torch.Tensor:
        """Means [V, C]."""
        return self._first / self.count

    @property
    def cov(self) -> torch.Tensor:
        """Covariances within each channel, summed over channels, [V, V]."""
        mean = self.mean
        return (self._second / self.count - mean[:, None] * mean[None, :]).sum(dim=2)


@dataclass(frozen=True)
class NoiseFit:
    """The noise of one timestep: slope k (0 if not significant), intercepts per channel, std of the rest."""

    k: float
    k_se: float
    r2: float
    bias: torch.Tensor
    shift: torch.Tensor
    q: float


def fit_noise(moments: Moments) -> NoiseFit:
    """Fit error = k output + bias_c + rest by least squares; `moments` holds (output, error).

    k counts when |k| / se > 3, R^2 > 0.05 and k > -0.5; else it is 0 and the rest is all of the error but its mean.
    """
    channels, count = moments.mean.shape[1], moments.count
    n = count / channels  # sums over channels of covariances are `channels` times the pooled one
    freedom = max(count * channels - channels - 1, 1)
    s = (moments.cov * count).numpy()
    s_mm, s_dd, s_md = max(s[0, 0], 0.0), max(s[1, 1], 0.0), s[0, 1]
    del n
    k, r2, k_se = 0.0, 0.0, 0.0
    if s_mm > 0 and s_dd > 0:
        k = s_md / s_mm
        r2 = s_md**2 / (s_mm * s_dd)
        k_se = math.sqrt(max(s_dd - k * s_md, 0.0) / freedom / s_mm)
    if not (abs(k) > MIN_T_VALUE * k_se and r2 > MIN_R2 and k > MIN_K):
        k = 0.0
    rest = max(s_dd - 2 * k * s_md + k**2 * s_mm, 0.0)
    mean_m, shift = moments.mean
    return NoiseFit(k=k, k_se=k_se, r2=r2, bias=shift - k * mean_m, shift=shift, q=math.sqrt(rest / freedom))
