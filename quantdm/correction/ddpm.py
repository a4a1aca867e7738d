"""DDPM with the quantization noise undone."""

from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

from quantdm.correction import variance
from quantdm.correction.corrected import CorrectedScheduler


class CorrectedDDPMScheduler(CorrectedScheduler, DDPMScheduler):
    """DDPMScheduler whose step undoes the mean of the quantization noise and lowers its own noise by the rest."""

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple:
        """Step as DDPMScheduler does, on the corrected output."""
        model_output = self.correct_mean(model_output, timestep, sample.shape[1])
        return super().step(model_output, timestep, sample, generator=generator, return_dict=return_dict)

    def _get_variance(
        self, t: int, predicted_variance: torch.Tensor | None = None, variance_type: Any = None
    ) -> torch.Tensor:
        # The base class takes the mean from elsewhere, so lowering the variance here leaves the mean alone.
        value = super()._get_variance(t, predicted_variance=predicted_variance, variance_type=variance_type)
        q = self.remaining_std(t)
        if q == 0:
            return value
        absorbed = variance.ddpm_absorbed(*self._alpha_bars(t), q)
        kind = variance_type or self.config.variance_type  # pyright: ignore[reportAttributeAccessIssue]
        if kind == "fixed_small_log":  # the base class answers a standard deviation here, a logarithm there
            return (value**2 - absorbed).clamp(min=0).sqrt()
        if kind == "learned_range":
            return (value.exp() - absorbed).clamp(min=0).log()
        return (value - absorbed).clamp(min=0)

    def _alpha_bars(self, timestep: int) -> tuple[float, float]:
        previous = self.previous_timestep(timestep)
        after = self.alphas_cumprod[previous] if previous >= 0 else self.one
        return float(self.alphas_cumprod[timestep]), float(after)


# model_index.json names the module of a scheduler's class, and diffusers looks there for `SchedulerMixin` to know how
# to open it: a path that stays the same wherever this file moves.
CorrectedDDPMScheduler.__module__ = "quantdm.correction.schedulers"
