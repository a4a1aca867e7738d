"""Streaming statistics of quantization noise: float64 sums per noise level and channel, then slope, bias, the rest."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from quantdm.correction.memory import ages
from quantdm.correction.moments import Moments, NoiseFit, fit_noise
from quantdm.correction.record import Correction
from quantdm.correction.variants import rival_tables, variant_of
from quantdm.errors import QuantDMError

# Values per channel and update that are kept for the robust cross-check of q.
KEPT_VALUES = 512
# Ratios of outputs count an output near zero as this share of the largest: TAC's sums have no mean without it.
MIN_RATIO = 0.05


class NoiseStatistics:
    """Streaming statistics of (full-precision, quantized) outputs on the same inputs, per noise level.

    Call `begin` before every batch of trajectories and `update` for each of its steps, in sampling order.
    """

    def __init__(self) -> None:
        self._steps: dict[float, Moments] = {}
        self._pairs: dict[tuple[float, float], Moments] = {}
        self._ratios: dict[float, Moments] = {}
        self._halves: dict[float, Moments] = {}
        self._kept: dict[float, list[torch.Tensor]] = {}
        self._last: tuple[float, torch.Tensor, torch.Tensor] | None = None

    def begin(self) -> None:
        """Start a new batch of trajectories: its first step does not follow the last one seen."""
        self._last = None

    def update(
        self,
        log_snr: float,
        output_fp: torch.Tensor,
        output_q: torch.Tensor,
        halves: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Add the outputs [N, C, ...] of one step.

        Args:
            log_snr: of the level at which the networks answered.
            output_fp: full precision, after guidance.
            output_q: quantized, on the same inputs, after guidance.
            halves: (unconditional, conditional) of full precision, then of the quantized network, before guidance.

        Raises:
            QuantDMError: the shapes differ, or a value is not finite.
        """
        where, level = f"noise statistics at log-SNR {log_snr:.2f}", round(log_snr, 9)
        if output_fp.shape != output_q.shape or output_fp.ndim < 2:
            raise QuantDMError(
                f"{where}: got outputs of shapes {tuple(output_fp.shape)} and "
                f"{tuple(output_q.shape)}, expected the same [N, C, ...] twice"
            )
        m = output_fp.detach().double().cpu()
        delta = output_q.detach().double().cpu() - m
        if not (m.isfinite().all() and delta.isfinite().all()):
            raise QuantDMError(f"{where}: an output is NaN or infinite; check the denoiser")
        self._steps.setdefault(level, Moments()).add(m, delta)
        least = MIN_RATIO * m.abs().amax()
        ratio = (m + delta) / torch.where(m.abs() < least, torch.where(m < 0, -least, least), m)
        self._ratios.setdefault(level, Moments()).add(ratio.nan_to_num(1.0), ratio.nan_to_num(1.0) ** 2)
        if halves is not None:
            free, given, free_q, given_q = (half.detach().double().cpu() for half in halves)
            self._halves.setdefault(level, Moments()).add(free, given, free_q - free, given_q - given)
        flat = torch.stack([m, delta]).transpose(1, 2).flatten(2)
        stride = max(flat.shape[2] // KEPT_VALUES, 1)
        self._kept.setdefault(level, []).append(flat[:, :, ::stride].clone())
        if self._last is not None:
            before, *last = self._last
            self._pairs.setdefault((before, level), Moments()).add(*last, m, delta)
        self._last = (level, m, delta)

    def correction(
        self,
        *,
        prediction_type: str = "epsilon",
        model: str = "",
        variant: str = "both+variance",
        axis: int = 1,
        network: str = "",
    ) -> Correction:
        """Fit every level; diagnostics are r2, k_se, bias_se, q_se, q_robust, lag1, count and snr.

        Args:
            prediction_type: what the network predicts.
            model: name of the model.
            variant: which part is on.
            axis: axis of the channels in a sample.
            network: hash of the denoiser's class and configuration.

        Raises:
            QuantDMError: nothing was added.
        """
        if not self._steps:
            raise QuantDMError("noise statistics: got no outputs, expected at least one step; call `update` first")
        levels = sorted(self._steps)  # from noise to image
        fits = {level: _fit(self._steps[level]) for level in levels}
        following = [self._following(level, fits) for level in levels]
        diagnostics = _errors(fits.values()) | {
            "q_robust": [self._robust_q(level, fits[level]) for level in levels],
            "lag1": [correlation for _, correlation in following],
            "count": [self._steps[level].count for level in levels],
            "snr": [self._snr(level) for level in levels],
        }
        return Correction(
            log_snr=np.array(levels),
            **_arrays(fits.values()),
            variant=variant,
            prediction_type=prediction_type,
            model=model,
            axis=axis,
            network=network,
            diagnostics={name: np.array(values, dtype=np.float64) for name, values in diagnostics.items()},
            rivals=self._rivals(levels, fits),
            components=self._components(levels),
            age=ages(levels, following),
        )

    def _rivals(self, levels: Sequence[float], fits: dict[float, NoiseFit]) -> dict[str, np.ndarray]:
        found: dict[str, list[np.ndarray]] = {}
        for level in levels:
            moments, fit = self._steps[level], fits[level]
            mean = moments.mean.numpy()
            second = moments.channel_cov.numpy() + mean[:, None] * mean[None, :]
            whole = math.sqrt(max(fit.q_all**2 * (1.0 - fit.r2), 0.0))
            tables = rival_tables(mean, second, self._ratios[level].mean.numpy(), fit.slope, (fit.q_all, whole))
            for name, table in tables.items():
                for part, values in zip(("gain", "bias", "q"), table, strict=True):
                    found.setdefault(f"{name}.{part}", []).append(np.asarray(values, dtype=np.float64))
        return {name: np.stack(values) for name, values in found.items()}

    def _components(self, levels: Sequence[float]) -> dict[str, np.ndarray]:
        """Return the moments of the four parts of guided outputs, if every level has them."""
        if any(level not in self._halves for level in levels):
            return {}
        parts = [self._halves[level] for level in levels]
        return {
            "mean": np.stack([part.mean.numpy() for part in parts]).astype(np.float64),
            "cov": np.stack([part.cov.numpy() for part in parts]).astype(np.float64),
            "count": np.array([part.count for part in parts], dtype=np.float64),
        }

    def _snr(self, level: float) -> float:
        """Return |output| / |error|, PTQD's signal-to-noise ratio; a huge one where there is no error."""
        moments = self._steps[level]
        m, delta = (moments.mean**2).sum(1) + moments.cov.diagonal()
        return float((m / delta.clamp(min=1e-30)).sqrt())

    def _robust_q(self, level: float, fit: NoiseFit) -> float:
        """Return IQR / 1.349 of the residual: far below q when a few outliers make up its variance."""
        m, delta = torch.cat(self._kept[level], dim=2)
        rest = delta - fit.k * m - torch.as_tensor(fit.bias)[:, None]
        low, high = np.quantile(rest.numpy(), [0.25, 0.75])
        return float(high - low) / 1.349

    def _following(self, level: float, fits: dict[float, NoiseFit]) -> tuple[float, float]:
        """Return the level that came next and the correlation of its residual with this one's; itself, 0: none came."""
        # a solver of second order asks twice at the same level: that is no step on
        later = [(pair, moments) for pair, moments in self._pairs.items() if pair[1] > level]
        following = [(pair[1], moments) for pair, moments in later if pair[0] == level]
        if not following:
            return level, 0.0
        after, moments = max(following, key=lambda item: item[1].count)
        here = torch.tensor([-fits[level].k, 1.0, 0.0, 0.0], dtype=torch.float64)
        there = torch.tensor([0.0, 0.0, -fits[after].k, 1.0], dtype=torch.float64)
        cov = moments.cov
        scale = ((here @ cov @ here).clamp(min=0) * (there @ cov @ there).clamp(min=0)).sqrt()
        return after, float(here @ cov @ there / scale) if scale > 0 else 0.0


def for_guidance(correction: Correction, scale: float) -> Correction:
    """Return the correction at another guidance scale, from the statistics of the outputs that are mixed.

    With e = (1 - s) e_u + s e_c and the same for the errors, mean and covariances follow, and with them k, bias and q.
    Which variant helps was measured at the scale of the fit, so `measured` is dropped; so are the tables of rivals.

    Raises:
        QuantDMError: the correction knows one output per step: guidance is an input of that network (distilled), or
            there was none.
    """
    parts = correction.components
    if not parts:
        raise QuantDMError(
            f"correction of {correction.model!r}: cannot be moved to guidance scale {scale}: it was fitted on one "
            "output per step (a guidance-distilled model, or no guidance); fit it anew at this scale"
        )
    if variant_of(correction.variant).table:
        raise QuantDMError(f"correction: variant {correction.variant!r} holds at the guidance scale of the fit only")
    mix = np.array([[1.0 - scale, scale, 0.0, 0.0], [0.0, 0.0, 1.0 - scale, scale]])
    fits = [
        fit_noise(mix @ mean, mix @ cov @ mix.T, int(count))
        for mean, cov, count in zip(parts["mean"], parts["cov"], parts["count"], strict=True)
    ]
    diagnostics = {name: np.array(values) for name, values in _errors(fits).items()}
    return replace(
        correction, **_arrays(fits), diagnostics={**diagnostics, "count": parts["count"]}, measured={}, rivals={}
    )


def _fit(moments: Moments) -> NoiseFit:
    return fit_noise(moments.mean.numpy(), moments.cov.numpy(), moments.count)


def _arrays(fits: Iterable[NoiseFit]) -> dict[str, Any]:
    fits = list(fits)
    return {name: np.stack([np.asarray(getattr(fit, name)) for fit in fits]) for name in ("k", "bias", "shift", "q")}


def _errors(fits: Iterable[NoiseFit]) -> dict[str, list[float]]:
    fits = list(fits)
    return {name: [getattr(fit, name) for fit in fits] for name in ("r2", "k_se", "bias_se", "q_se")}


def statistics_from_pairs(
    log_snrs: Sequence[float], outputs_fp: Iterable[torch.Tensor], outputs_q: Iterable[torch.Tensor]
) -> NoiseStatistics:
    """Return the statistics of one batch of trajectories.

    Args:
        log_snrs: of the levels in sampling order.
        outputs_fp: full-precision outputs after guidance, [N, C, ...] per level.
        outputs_q: quantized outputs on the same inputs.
    """
    statistics = NoiseStatistics()
    statistics.begin()
    for level, output_fp, output_q in zip(log_snrs, outputs_fp, outputs_q, strict=True):
        statistics.update(level, output_fp, output_q)
    return statistics
