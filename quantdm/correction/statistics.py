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
    def cov(self) -> torch.Tensor:
        """Covariances within each channel, summed over channels, [V, V]."""
        mean = self._first / self.count
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
    freedom = max(count * channels - channels - 1, 1)
    s = (moments.cov * count).numpy()
    s_mm, s_dd, s_md = max(s[0, 0], 0.0), max(s[1, 1], 0.0), s[0, 1]
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


class NoiseStatistics:
    """Streaming statistics of (full-precision, quantized) outputs on the same inputs, per timestep.

    Call `begin` before every batch of trajectories and `update` for each of its steps, in sampling order.
    """

    def __init__(self) -> None:
        self._steps: dict[int, Moments] = {}
        self._pairs: dict[tuple[int, int], Moments] = {}
        self._kept: dict[int, list[torch.Tensor]] = {}
        self._last: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def begin(self) -> None:
        """Start a new batch of trajectories: its first step does not follow the last one seen."""
        self._last = None

    def update(self, timestep: int, output_fp: torch.Tensor, output_q: torch.Tensor) -> None:
        """Add the outputs [N, C, ...] of one step.

        Raises:
            QuantDMError: the shapes differ, or a value is not finite.
        """
        if output_fp.shape != output_q.shape or output_fp.ndim < 2:
            raise QuantDMError(
                f"noise statistics at t={timestep}: got outputs of shapes {tuple(output_fp.shape)} and "
                f"{tuple(output_q.shape)}, expected the same [N, C, ...] twice"
            )
        m = output_fp.detach().double().cpu()
        delta = output_q.detach().double().cpu() - m
        if not (m.isfinite().all() and delta.isfinite().all()):
            raise QuantDMError(f"noise statistics at t={timestep}: an output is NaN or infinite; check the denoiser")
        self._steps.setdefault(timestep, Moments()).add(m, delta)
        flat = torch.stack([m, delta]).transpose(1, 2).flatten(2)
        stride = max(flat.shape[2] // KEPT_VALUES, 1)
        self._kept.setdefault(timestep, []).append(flat[:, :, ::stride].clone())
        if self._last is not None:
            before, *last = self._last
            self._pairs.setdefault((before, timestep), Moments()).add(*last, m, delta)
        self._last = (timestep, m, delta)

    def correction(
        self,
        alphas_cumprod: torch.Tensor,
        *,
        prediction_type: str = "epsilon",
        model: str = "",
        variant: str = "both+variance",
    ) -> Correction:
        """Fit every timestep and return the correction, with r2, k_se, q_robust, lag1 and count as diagnostics.

        Args:
            alphas_cumprod: the schedule's products of alpha over training timesteps.
            prediction_type: "epsilon", "v_prediction" or "sample".
            model: name of the model.
            variant: which part is on.

        Raises:
            QuantDMError: nothing was added.
        """
        if not self._steps:
            raise QuantDMError("noise statistics: got no outputs, expected at least one step; call `update` first")
        timesteps = sorted(self._steps, reverse=True)  # from noise to image: log-SNR increases
        fits = {t: fit_noise(self._steps[t]) for t in timesteps}
        diagnostics = {
            "r2": [fits[t].r2 for t in timesteps],
            "k_se": [fits[t].k_se for t in timesteps],
            "q_robust": [self._robust_q(t, fits[t]) for t in timesteps],
            "lag1": [self._lag1(t, fits) for t in timesteps],
            "count": [self._steps[t].count for t in timesteps],
        }
        return Correction(
            timesteps=np.array(timesteps),
            log_snr=np.array([log_snr(float(alphas_cumprod[t])) for t in timesteps]),
            k=np.array([fits[t].k for t in timesteps]),
            bias=torch.stack([fits[t].bias for t in timesteps]).numpy(),
            shift=torch.stack([fits[t].shift for t in timesteps]).numpy(),
            q=np.array([fits[t].q for t in timesteps]),
            variant=variant,
            prediction_type=prediction_type,
            model=model,
            diagnostics={name: np.array(values, dtype=np.float64) for name, values in diagnostics.items()},
        )

    def _robust_q(self, timestep: int, fit: NoiseFit) -> float:
        """Return IQR / 1.349 of the residual: far below q when a few outliers make up its variance."""
        m, delta = torch.cat(self._kept[timestep], dim=2)
        rest = delta - fit.k * m - fit.bias[:, None]
        low, high = np.quantile(rest.numpy(), [0.25, 0.75])
        return float(high - low) / 1.349

    def _lag1(self, timestep: int, fits: dict[int, NoiseFit]) -> float:
        """Return the correlation of the residual with that of the next step, 0 where there is none."""
        following = [(pair[1], moments) for pair, moments in self._pairs.items() if pair[0] == timestep]
        if not following:
            return 0.0
        after, moments = max(following, key=lambda item: item[1].count)
        here = torch.tensor([-fits[timestep].k, 1.0, 0.0, 0.0], dtype=torch.float64)
        there = torch.tensor([0.0, 0.0, -fits[after].k, 1.0], dtype=torch.float64)
        cov = moments.cov
        scale = ((here @ cov @ here).clamp(min=0) * (there @ cov @ there).clamp(min=0)).sqrt()
        return float(here @ cov @ there / scale) if scale > 0 else 0.0


def statistics_from_pairs(
    timesteps: Sequence[int], outputs_fp: Iterable[torch.Tensor], outputs_q: Iterable[torch.Tensor]
) -> NoiseStatistics:
    """Return the statistics of one batch of trajectories.

    Args:
        timesteps: training timesteps in sampling order.
        outputs_fp: full-precision outputs after guidance, [N, C, ...] per timestep.
        outputs_q: quantized outputs on the same inputs.
    """
    statistics = NoiseStatistics()
    statistics.begin()
    for timestep, output_fp, output_q in zip(timesteps, outputs_fp, outputs_q, strict=True):
        statistics.update(int(timestep), output_fp, output_q)
    return statistics
