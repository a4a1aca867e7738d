"""Corrected schedulers: diffusers' DDIM and DDPM with the quantization noise undone around their own `step`.

A corrected scheduler keeps the plain config and adds one private entry, `_quantdm`. diffusers carries private entries
through `save_pretrained`, `from_pretrained` and `from_config` of every scheduler class, so a corrected pipeline saves
and loads as it is (after `import quantdm`), and the same scheduler_config.json opens as the plain scheduler without us.
"""

import copy
from typing import Any, cast

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from quantdm.correction import variance
from quantdm.correction.record import Correction, StepCorrection
from quantdm.errors import QuantDMError

_KEY = "_quantdm"


class CorrectedScheduler(SchedulerMixin, ConfigMixin):
    """What the corrected schedulers share: the correction and the default eta, read from the config."""

    alphas_cumprod: torch.Tensor

    @property
    def correction(self) -> Correction | None:
        """The correction that is applied."""
        record = self.config.get(_KEY, {}).get("correction")
        if record is None:
            return None
        parsed = self.__dict__.get("_parsed")
        if parsed is None or parsed[0] is not record:
            parsed = self.__dict__["_parsed"] = (record, Correction.from_dict(record))
        return parsed[1]

    @property
    def default_eta(self) -> float:
        """The eta of a step that is given none (DiTPipeline gives none)."""
        return self.config.get(_KEY, {}).get("eta", 0.0)

    def correct_mean(self, model_output: torch.Tensor, timestep: int, channels: int) -> torch.Tensor:
        """Return (model_output - bias) / (1 + k) on the first `channels` channels (the rest predict a variance).

        This is the unbiased inverse, not the posterior mean: shrinking would over-disperse the samples.
        """
        correction = self.correction
        if correction is None or correction.variant == "none":
            return model_output
        if correction.channels != channels:
            raise QuantDMError(
                f"correction of model {correction.model!r} is for {correction.channels} channels, the sample has "
                f"{channels}: it belongs to another model; fit one with `fit_correction`"
            )
        at = correction.at(variance.log_snr(float(self.alphas_cumprod[timestep])))
        head, rest = model_output[:, :channels], model_output[:, channels:]
        wide = head.to(torch.promote_types(head.dtype, torch.float32))
        bias = torch.as_tensor(at.bias, dtype=wide.dtype, device=wide.device).view(1, -1, *[1] * (head.ndim - 2))
        return torch.cat([((wide - bias) / (1.0 + at.k)).to(head.dtype), rest], dim=1)

    def remaining_std(self, timestep: int) -> float:
        """Return q, the std in epsilon units of the noise that the mean correction leaves; 0 if it is not used."""
        correction = self.correction
        if correction is None or not correction.uses_variance:
            return 0.0
        alpha_bar = float(self.alphas_cumprod[timestep])
        return _epsilon_std(correction, alpha_bar, correction.at(variance.log_snr(alpha_bar)))


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


_CORRECTED: dict[type, type[CorrectedScheduler]] = {
    DDIMScheduler: CorrectedDDIMScheduler,
    DDPMScheduler: CorrectedDDPMScheduler,
}
_PLAIN = {corrected: plain for plain, corrected in _CORRECTED.items()}


def apply_correction(
    pipe: DiffusionPipeline, correction: Correction | None, *, eta: float | None = None
) -> DiffusionPipeline:
    """Give a pipeline the corrected scheduler of its own class and config, in place; it saves and loads with it.

    Args:
        pipe: a pipeline with a DDIM or DDPM scheduler, corrected already or not.
        correction: what to undo (None: nothing, only the default eta).
        eta: default eta of DDIM for pipelines that pass none (None: as it is).

    Returns:
        The same pipeline.

    Raises:
        QuantDMError: the scheduler is not supported (those that are get listed), or does not fit the correction.
    """
    scheduler = pipe.scheduler
    plain = _PLAIN.get(type(scheduler), type(scheduler))
    if plain not in _CORRECTED:
        raise QuantDMError(
            f"correction: got scheduler {type(scheduler).__name__}, expected one of "
            f"{', '.join(known.__name__ for known in _CORRECTED)}; set `pipe.scheduler` to one of them"
        )
    if correction is not None and scheduler.config.prediction_type != correction.prediction_type:
        raise QuantDMError(
            f"correction of model {correction.model!r} was fitted on {correction.prediction_type} predictions, the "
            f"scheduler has {scheduler.config.prediction_type}; it belongs to another model"
        )
    lowers = correction is not None and correction.uses_variance
    if lowers and scheduler.config.get("variance_type") == "fixed_large_log":
        raise QuantDMError(
            "correction: the variance of variance_type 'fixed_large_log' cannot be lowered; take variant 'both' or "
            "variance_type 'fixed_large'"
        )
    if eta is not None and (not 0.0 <= eta <= 1.0 or (plain is not DDIMScheduler and eta > 0)):
        raise QuantDMError(f"correction: got eta {eta} for {plain.__name__}, expected 0 to 1 and DDIMScheduler")
    record = {
        "correction": None if correction is None else correction.to_dict(),
        "eta": scheduler.config.get(_KEY, {}).get("eta", 0.0) if eta is None else eta,
    }
    pipe.scheduler = _CORRECTED[plain].from_config({**_plain_config(scheduler), _KEY: record})
    return pipe


def remove_correction(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Put the plain scheduler back, in place; a pipeline that has no correction stays as it is."""
    plain = _PLAIN.get(type(pipe.scheduler))
    if plain is not None:
        pipe.scheduler = cast(Any, plain).from_config(_plain_config(pipe.scheduler))
    return pipe


def step_table(
    correction: Correction, scheduler: DDIMScheduler | DDPMScheduler, steps: int, *, eta: float = 0.0
) -> list[dict[str, float]]:
    """Return per sampling step what the full correction does, for the report; the scheduler itself stays as it is.

    Keys: timestep, log_snr, k, bias (largest channel), q (epsilon units), occupancy (variance that the noise adds over
    what the step may have: the injected one, or that of the next noise level when nothing is injected), feasible (1 or
    0: whether the variance correction acts), and the diagnostics of the fit (r2, lag1, ...), interpolated.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    full, rows = correction.with_variant("both+variance"), []
    products = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps]
    last = 1.0 if isinstance(scheduler, DDPMScheduler) else float(scheduler.final_alpha_cumprod)
    for timestep, alpha_bar, alpha_bar_prev in zip(scheduler.timesteps, products, [*products[1:], last], strict=True):
        level = variance.log_snr(alpha_bar)
        at = full.at(level)
        q = _epsilon_std(full, alpha_bar, at)
        if isinstance(scheduler, DDPMScheduler) or eta > 0:
            sigma = variance.ddim_sigma(alpha_bar, alpha_bar_prev, eta if isinstance(scheduler, DDIMScheduler) else 1.0)
            available = sigma**2
            if isinstance(scheduler, DDPMScheduler):
                absorbed = variance.ddpm_absorbed(alpha_bar, alpha_bar_prev, q)
            else:
                absorbed = variance.ddim_absorbed(alpha_bar, alpha_bar_prev, sigma, q)
            feasible = absorbed <= available
        else:
            here, after = variance.noise_level(alpha_bar), variance.noise_level(alpha_bar_prev)
            available = after**2
            absorbed = ((here - after) * q) ** 2
            feasible = variance.deterministic_target(here, after, q) < after
        rows.append(
            {
                "timestep": int(timestep),
                "log_snr": level,
                "k": at.k,
                "bias": float(abs(at.bias).max()),
                "q": q,
                "occupancy": absorbed / available if available > 0 else 0.0,
                "feasible": float(feasible),
                **correction.diagnostics_at(level),
            }
        )
    return rows


def _plain_config(scheduler: SchedulerMixin) -> dict[str, Any]:
    return {key: value for key, value in cast(Any, scheduler).config.items() if key not in (_KEY, "_class_name")}


def _epsilon_std(correction: Correction, alpha_bar: float, at: StepCorrection) -> float:
    return at.q / (1.0 + at.k) * variance.epsilon_units(correction.prediction_type, alpha_bar)


def _deterministic_stretch(alpha_bar: float, alpha_bar_prev: float, q: float) -> float:
    sigma, sigma_next = variance.noise_level(alpha_bar), variance.noise_level(alpha_bar_prev)
    target = variance.deterministic_target(sigma, sigma_next, q)
    return 1.0 if target == sigma_next else (target - sigma) / (sigma_next - sigma)
