"""DDIM with the quantization noise undone."""

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from quantdm.correction import variance
from quantdm.correction.corrected import CorrectedScheduler
from quantdm.errors import QuantDMError


class CorrectedDDIMScheduler(CorrectedScheduler, DDIMScheduler):
    """DDIMScheduler whose step undoes the mean of the quantization noise and makes room for its variance."""

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        eta: float | None = None,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple:
        """Step as DDIMScheduler does, on the corrected output; `eta=None` means the scheduler's default eta.

        Raises:
            QuantDMError: no number of steps was set, or eta asks for more noise than the schedule has.
        """
        eta = self._real_eta(timestep, self.default_eta if eta is None else eta)
        model_output = self.correct_mean(model_output, timestep, sample.shape[1])
        q = self.remaining_std(timestep)
        if q > 0 and eta > 0 and (generator is None or variance_noise is None):
            variance_noise = self._lowered_noise(model_output, timestep, eta, q, variance_noise, generator)
            generator = None
        prev_sample, pred_original_sample = super().step(
            model_output,
            timestep,
            sample,
            eta=eta,
            use_clipped_model_output=use_clipped_model_output,
            generator=generator,
            variance_noise=variance_noise,
            return_dict=False,
        )
        if q > 0 and eta == 0:
            prev_sample = self._stretched(prev_sample, timestep, sample, q)
        if not return_dict:
            return prev_sample, pred_original_sample
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def _lowered_noise(
        self,
        model_output: torch.Tensor,
        timestep: int,
        eta: float,
        q: float,
        noise: torch.Tensor | None,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """Return the noise to inject, drawn if none is given, lowered by what the quantization noise adds."""
        if noise is None:
            noise = randn_tensor(
                model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
            )
        # Scaling the noise leaves the direction term at the original sigma_t; lowering eta would move the mean.
        alpha_bar, alpha_bar_prev = self._alpha_bars(timestep)
        sigma = variance.ddim_sigma(alpha_bar, alpha_bar_prev, eta)
        absorbed = variance.ddim_absorbed(alpha_bar, alpha_bar_prev, sigma, q)
        return noise * variance.kept_std(sigma, absorbed)

    def _stretched(self, prev_sample: torch.Tensor, timestep: int, sample: torch.Tensor, q: float) -> torch.Tensor:
        alpha_bar, alpha_bar_prev = self._alpha_bars(timestep)
        stretch = variance.deterministic_stretch(alpha_bar, alpha_bar_prev, q)
        if stretch == 1.0:
            return prev_sample
        # x / sqrt(alpha_bar) moves along a straight line with the noise level: go further along it
        start = sample * (alpha_bar_prev / alpha_bar) ** 0.5
        return start + (prev_sample - start) * stretch

    def _real_eta(self, timestep: int, eta: float) -> float:
        """Return eta, lowered by some roundings where 1 - alpha_bar' - sigma^2 rounds below zero.

        At zero terminal SNR with eta = 1 it is zero, and DDIMScheduler's square root of it is NaN on some processors.
        What is tried here is computed as DDIMScheduler does, on the same tensors: where that is real, eta stays.
        """
        if not eta > 0:
            return eta
        previous = self._previous(timestep)
        after = self.alphas_cumprod[previous] if previous >= 0 else self.final_alpha_cumprod
        std = self._get_variance(int(timestep), previous) ** 0.5
        lowered = eta
        while 1 - after - (lowered * std) ** 2 < 0:
            lowered *= 1 - 2**-23
            if lowered < eta * (1 - 2**-16):
                raise QuantDMError(
                    f"scheduler: got eta {eta}, expected 0 to 1: there is less noise at timestep {int(timestep)}"
                )
        return lowered

    def _previous(self, timestep: int) -> int:
        if self.num_inference_steps is None:
            raise QuantDMError("scheduler: got no number of steps; call `set_timesteps` before `step`")
        return int(timestep) - self.config.num_train_timesteps // self.num_inference_steps  # pyright: ignore[reportAttributeAccessIssue]

    def _alpha_bars(self, timestep: int) -> tuple[float, float]:
        previous = self._previous(timestep)
        after = self.alphas_cumprod[previous] if previous >= 0 else self.final_alpha_cumprod
        return float(self.alphas_cumprod[timestep]), float(after)


# model_index.json names the module of a scheduler's class, and diffusers looks there for `SchedulerMixin` to know how
# to open it: a path that stays the same wherever this file moves.
CorrectedDDIMScheduler.__module__ = "quantdm.correction.schedulers"
