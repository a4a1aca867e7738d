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
        """Step as DDIMScheduler does, on the corrected output; `eta=None` means the scheduler's default eta."""
        eta = self.default_eta if eta is None else eta
        model_output = self.correct_mean(model_output, timestep, sample.shape[1])
        q = self.remaining_std(timestep)
        alpha_bar, alpha_bar_prev = self._alpha_bars(timestep) if q > 0 else (1.0, 1.0)
        if q > 0 and eta > 0 and (generator is None or variance_noise is None):
            if variance_noise is None:
                variance_noise = randn_tensor(
                    model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
                )
            # Scaling the noise leaves the direction term at the original sigma_t; lowering eta would move the mean.
            sigma = variance.ddim_sigma(alpha_bar, alpha_bar_prev, eta)
            absorbed = variance.ddim_absorbed(alpha_bar, alpha_bar_prev, sigma, q)
            variance_noise = variance_noise * variance.kept_std(sigma, absorbed)
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
            stretch = _deterministic_stretch(alpha_bar, alpha_bar_prev, q)
            if stretch != 1.0:
                # x / sqrt(alpha_bar) moves along a straight line with the noise level: go further along it
                start = sample * (alpha_bar_prev / alpha_bar) ** 0.5
                prev_sample = start + (prev_sample - start) * stretch
        if not return_dict:
            return prev_sample, pred_original_sample
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def _alpha_bars(self, timestep: int) -> tuple[float, float]:
        if self.num_inference_steps is None:
            raise QuantDMError("scheduler: got no number of steps; call `set_timesteps` before `step`")
        previous = int(timestep) - self.config.num_train_timesteps // self.num_inference_steps  # pyright: ignore[reportAttributeAccessIssue]
        after = self.alphas_cumprod[previous] if previous >= 0 else self.final_alpha_cumprod
        return float(self.alphas_cumprod[timestep]), float(after)


# model_index.json names the module of a scheduler's class, and diffusers looks there for `SchedulerMixin` to know how
# to open it: a path that stays the same wherever this file moves.
CorrectedDDIMScheduler.__module__ = "quantdm.correction.schedulers"


def _deterministic_stretch(alpha_bar: float, alpha_bar_prev: float, q: float) -> float:
    sigma, sigma_next = variance.noise_level(alpha_bar), variance.noise_level(alpha_bar_prev)
    target = variance.deterministic_target(sigma, sigma_next, q)
    return 1.0 if target == sigma_next else (target - sigma) / (sigma_next - sigma)
