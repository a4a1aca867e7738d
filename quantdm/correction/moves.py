"""The step of every single-step sampler as a `Move`: from where, to where, with how much fresh noise.

A scheduler without a row here (and multistep solvers, which have `multistep.py`) has its mean corrected alone.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from quantdm.correction.levels import Level, flow_level, plain_name, product_level, sigma_level, step_index
from quantdm.correction.variance import Move, ddim_variance
from quantdm.errors import QuantDMError


@dataclass(frozen=True)
class Step:
    """A move, the levels at which it starts and ends, and the sample from which it starts (None: the step's own)."""

    move: Move
    start: Level
    end: Level
    sample: torch.Tensor | None = None


# The std of what remains on the prediction of e at a level.
Noise = Callable[[Level], float]
# scheduler, arguments of its step, level of the step, noise -> the step (None: only its mean can be corrected)
Mover = Callable[[Any, Mapping[str, Any], Level, Noise], Step | None]


def step_of(scheduler: Any, arguments: Mapping[str, Any], here: Level, noise: Noise) -> Step | None:
    """Return the step that comes; None: only its mean can be corrected."""
    mover = MOVERS.get(plain_name(scheduler))
    return None if mover is None else mover(scheduler, arguments, here, noise)


def _line(here: Level, after: Level, target: float, noise: float, spare: float | torch.Tensor = 0.0) -> Step:
    # From pure noise there is no e to speak of, and all of the next level is room: the scheduler's own step is taken.
    added = ((here.sigma - target) * noise) ** 2 if math.isfinite(here.sigma) else 0.0
    return Step(Move(here.sigma, target, after.sigma, added, spare), here, after)


def _ancestral(here: Level, after: Level, noise: float, eta: float = 1.0) -> Step:
    """DDIM at any eta; at 1 it is also the step of DDPM, Euler ancestral and first-order SDE-DPM-Solver++."""
    spare = ddim_variance(here.sigma, after.sigma, eta)
    return _line(here, after, math.sqrt(max(after.sigma**2 - spare, 0.0)), noise, spare)


def _ddim(scheduler: Any, arguments: Mapping[str, Any], here: Level, noise: Noise) -> Step:
    after = _ddim_after(scheduler, int(arguments["timestep"]))
    return _ancestral(here, after, noise(here), arguments.get("eta", 0.0))


def _ddim_without_noise(scheduler: Any, arguments: Mapping[str, Any], here: Level, noise: Noise) -> Step:
    after = _ddim_after(scheduler, int(arguments["timestep"]))
    return _ancestral(here, after, noise(here), 0.0)


def _ddim_after(scheduler: Any, timestep: int) -> Level:
    previous = ddim_previous(scheduler, timestep)
    return product_level(scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod)


def ddim_previous(scheduler: Any, timestep: int) -> int:
    """Return the timestep that DDIM steps to; below 0 at the end."""
    if scheduler.num_inference_steps is None:
        raise QuantDMError("scheduler: got no number of steps; call `set_timesteps` before `step`")
    return timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps


def _ddpm(scheduler: Any, arguments: Mapping[str, Any], here: Level, noise: Noise) -> Step:
    timestep = int(arguments["timestep"])
    previous = int(scheduler.previous_timestep(timestep))
    after = product_level(scheduler.alphas_cumprod[previous]) if previous >= 0 else Level(1.0, 0.0)
    target = after.sigma**2 / here.sigma if here.sigma > 0.0 else 0.0  # of the posterior's mean (Ho et al. 2020)
    spare = _ddpm_variance(scheduler, arguments) / after.signal**2 if timestep > 0 and after.signal > 0.0 else 0.0
    return _line(here, after, target, noise(here), spare)


def _ddpm_variance(scheduler: Any, arguments: Mapping[str, Any]) -> float | torch.Tensor:
    """Return the variance that DDPM is about to inject, whatever its type answers in."""
    output, sample = arguments["model_output"], arguments["sample"]
    predicted = output[:, sample.shape[1] :] if output.shape[1] == 2 * sample.shape[1] else None
    value = scheduler._get_variance(int(arguments["timestep"]), predicted_variance=predicted)
    kind = scheduler.config.variance_type
    if kind == "fixed_small_log":  # a standard deviation here, a logarithm there
        value = value**2
    elif kind == "learned_range":
        value = value.exp()
    return value if value.numel() > 1 else float(value)


def _lcm(scheduler: Any, arguments: Mapping[str, Any], here: Level, noise: Noise) -> Step:
    timestep = arguments["timestep"]
    following = step_index(scheduler, timestep) + 1
    last = following >= len(scheduler.timesteps)
    after = Level(1.0, 0.0) if last else product_level(scheduler.alphas_cumprod[int(scheduler.timesteps[following])])
    out = float(scheduler.get_scalings_for_boundary_condition_discrete(timestep)[1])
    return _line(here, after, 0.0, out * noise(here), after.sigma**2)


def _tcd(scheduler: Any, arguments: Mapping[str, Any], here: Level, noise: Noise) -> Step | None:
    following = step_index(scheduler, arguments["timestep"]) + 1
    if following >= len(scheduler.timesteps):
        return None  # the last step ends at the image
    timestep = int(scheduler.timesteps[following])
    after = product_level(scheduler.alphas_cumprod[timestep])
    between = product_level(scheduler.alphas_cumprod[int((1 - arguments.get("eta", 0.3)) * timestep)])
    spare = after.sigma**2 - between.sigma**2
    return _line(here, after, between.sigma, noise(here), max(spare, 0.0))


def _euler(scheduler: Any, arguments: Mapping[str, Any], here: Level, noise: Noise) -> Step | None:
    if arguments.get("s_churn", 0.0) > 0.0:
        return None  # churning raises the level before the step
    after = sigma_level(scheduler, scheduler.step_index + 1)
    return _ancestral(here, after, noise(here), 0.0)


def _euler_ancestral(scheduler: Any, arguments: Mapping[str, Any], here: Level, noise: Noise) -> Step:
    after = sigma_level(scheduler, scheduler.step_index + 1)
    return _ancestral(here, after, noise(here))


def _flow_euler(scheduler: Any, arguments: Mapping[str, Any], here: Level, noise: Noise) -> Step | None:
    after = flow_level(scheduler, scheduler.step_index + 1)
    if scheduler.config.stochastic_sampling:
        return _line(here, after, 0.0, noise(here), after.sigma**2)
    return _ancestral(here, after, noise(here), 0.0)


def _flow_lcm(scheduler: Any, arguments: Mapping[str, Any], here: Level, noise: Noise) -> Step:
    after = flow_level(scheduler, scheduler.step_index + 1)
    return _line(here, after, 0.0, noise(here), after.sigma**2)


def _heun(level_at: Callable[[Any, int], Level]) -> Mover:
    def mover(scheduler: Any, arguments: Mapping[str, Any], here: Level, noise: Noise) -> Step | None:
        index = scheduler.step_index
        if arguments.get("s_churn", 0.0) > 0.0:
            return None
        if scheduler.state_in_first_order:
            after = level_at(scheduler, index + 1)
            # The predictor is only looked at, except at the end, where it is the step.
            return None if after.sigma > 0.0 else _ancestral(here, after, noise(here), 0.0)
        start, after = level_at(scheduler, index - 1), level_at(scheduler, index)
        both = math.hypot(noise(start), noise(after)) / 2.0  # the mean of two predictions
        return replace(_ancestral(start, after, both, 0.0), sample=scheduler.sample)

    return mover


MOVERS: dict[str, Mover] = {
    "DDIMScheduler": _ddim,
    "DDIMParallelScheduler": _ddim,
    "CogVideoXDDIMScheduler": _ddim_without_noise,
    "DDPMScheduler": _ddpm,
    "DDPMParallelScheduler": _ddpm,
    "LCMScheduler": _lcm,
    "TCDScheduler": _tcd,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _euler_ancestral,
    "HeunDiscreteScheduler": _heun(sigma_level),
    "FlowMatchEulerDiscreteScheduler": _flow_euler,
    "FlowMatchHeunDiscreteScheduler": _heun(flow_level),
    "FlowMatchLCMScheduler": _flow_lcm,
}
