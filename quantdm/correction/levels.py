"""Where a sampler stands: the noise level at which the network answers, whatever a scheduler counts its steps in.

A scheduler is read by its family, not by its class: products of alpha over training timesteps, sigmas of x + sigma e,
pairs (alpha, sigma), flow matching, preconditioned (EDM), and some that have a clock of their own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from quantdm.correction import variance
from quantdm.errors import QuantDMError


@dataclass(frozen=True)
class Level:
    """x = signal x0 + noise e."""

    signal: float
    noise: float

    @property
    def sigma(self) -> float:
        """The noise level of x / signal; infinite where there is no signal."""
        return self.noise / self.signal if self.signal > 0.0 else math.inf

    @property
    def log_snr(self) -> float:
        """The logarithm of signal^2 / noise^2, held finite."""
        return variance.log_snr(self.sigma)


def product_level(alpha_bar: float | torch.Tensor) -> Level:
    """Return the level of a product of alphas."""
    value = min(max(float(alpha_bar), 0.0), 1.0)
    return Level(math.sqrt(value), math.sqrt(1.0 - value))


def step_index(scheduler: Any, timestep: Any) -> int:
    """Return the index of the step that comes, as the scheduler itself finds it at its first step."""
    if scheduler.step_index is None:
        if hasattr(scheduler, "_init_step_index"):
            scheduler._init_step_index(timestep)
        else:  # MiniMax starts where it is told, or at the timestep
            begin: int | None = scheduler._begin_index
            return scheduler.index_for_timestep(timestep) if begin is None else begin
    index: Any = scheduler.step_index
    return int(index)


def ratio_level(scheduler: Any, index: int) -> Level:
    """Return the level of entry `index` of `sigmas` of a solver that knows pairs (alpha, sigma)."""
    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index].double())
    return Level(float(alpha), float(sigma))


def sigma_level(scheduler: Any, index: int) -> Level:
    """Return the level of entry `index` of `sigmas` of x + sigma e."""
    return Level(1.0, float(scheduler.sigmas[index]))


def flow_level(scheduler: Any, index: int) -> Level:
    """Return the level of entry `index` of `sigmas` of (1 - s) x0 + s e."""
    s = float(scheduler.sigmas[index])
    return Level(max(1.0 - s, 0.0), s)


def _of_timestep(scheduler: Any, timestep: Any) -> Level:
    return product_level(scheduler.alphas_cumprod[int(timestep)])


def _of_sigmas(scheduler: Any, timestep: Any) -> Level:
    return sigma_level(scheduler, step_index(scheduler, timestep))


def _of_midpoints(scheduler: Any, timestep: Any) -> Level:
    """Return the level of a solver that also looks at midpoints (KDPM2)."""
    index = step_index(scheduler, timestep)
    if scheduler.state_in_first_order:
        return sigma_level(scheduler, index)
    ancestral = hasattr(scheduler, "sigmas_up")
    return Level(1.0, float(scheduler.sigmas_interpol[index - 1 if ancestral else index]))


def _of_ratios(scheduler: Any, timestep: Any) -> Level:
    return ratio_level(scheduler, step_index(scheduler, timestep))


def _of_flow(scheduler: Any, timestep: Any) -> Level:
    return flow_level(scheduler, step_index(scheduler, timestep))


def _of_continuous_products(scheduler: Any, timestep: Any) -> Level:
    return product_level(scheduler._alpha_cumprod(timestep.flatten()[:1], timestep.device).flatten()[0])


def _of_alphas(scheduler: Any, timestep: Any) -> Level:
    index = step_index(scheduler, timestep)
    return Level(float(scheduler.alphas[index]), float(scheduler.betas[index]))


def _of_angles(scheduler: Any, timestep: Any) -> Level:
    angle = float(scheduler.timesteps[step_index(scheduler, timestep)])
    return Level(math.cos(angle), math.sin(angle))


Reader = Callable[[Any, Any], Level]
# Scheduler -> how its level is read, and what its networks predict (None: its configuration says it).
_FAMILIES: tuple[tuple[Reader, str | None, tuple[str, ...]], ...] = (
    (
        _of_timestep,
        None,
        (
            "DDIMScheduler",
            "DDIMParallelScheduler",
            "DDIMInverseScheduler",
            "CogVideoXDDIMScheduler",
            "CogVideoXDPMScheduler",
            "DDPMScheduler",
            "DDPMParallelScheduler",
            "LCMScheduler",
            "TCDScheduler",
            "PNDMScheduler",
            "UnCLIPScheduler",
        ),
    ),
    (_of_timestep, "epsilon", ("RePaintScheduler",)),
    (_of_continuous_products, "epsilon", ("DDPMWuerstchenScheduler",)),
    (
        _of_sigmas,
        None,
        (
            "EulerDiscreteScheduler",
            "EulerAncestralDiscreteScheduler",
            "HeunDiscreteScheduler",
            "LMSDiscreteScheduler",
            "DPMSolverSDEScheduler",
        ),
    ),
    (_of_midpoints, None, ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")),
    (
        _of_ratios,
        None,
        (
            "DPMSolverMultistepScheduler",
            "DPMSolverMultistepInverseScheduler",
            "DPMSolverSinglestepScheduler",
            "DEISMultistepScheduler",
            "SASolverScheduler",
            "UniPCMultistepScheduler",
        ),
    ),
    (
        _of_flow,
        "flow_prediction",
        (
            "FlowMatchEulerDiscreteScheduler",
            "FlowMatchHeunDiscreteScheduler",
            "FlowMatchLCMScheduler",
            "FlowMapEulerDiscreteScheduler",
            "LTXEulerAncestralRFScheduler",
            "MiniMaxH3Scheduler",
        ),
    ),
    (_of_sigmas, "edm", ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler")),
    (_of_sigmas, "consistency", ("CMStochasticIterativeScheduler",)),
    (_of_alphas, "v_prediction", ("IPNDMScheduler",)),
    (_of_angles, "trigflow", ("SCMScheduler",)),
)
READERS: dict[str, tuple[Reader, str | None]] = {
    name: (reader, prediction) for reader, prediction, names in _FAMILIES for name in names
}
SERVED = tuple(sorted(READERS))


def check_served(scheduler: Any) -> None:
    """Check that a scheduler can be corrected.

    Raises:
        QuantDMError: it cannot; those that can are listed.
    """
    if plain_name(scheduler) not in READERS:
        raise QuantDMError(
            f"correction: got scheduler {type(scheduler).__name__}, expected one of {', '.join(SERVED)}; a "
            "pipeline that is saved with one of them can be corrected, this one is used without"
        )


def plain_name(scheduler: Any) -> str:
    """Return the name of a scheduler's diffusers class, corrected or not."""
    return type(scheduler).__name__.removeprefix("Corrected")


def level_of(scheduler: Any, timestep: Any) -> Level:
    """Return the level at which the network has answered the step that comes."""
    return READERS[plain_name(scheduler)][0](scheduler, timestep)


def prediction_of(scheduler: Any) -> str:
    """Return what a network predicts for this scheduler.

    "epsilon", "v_prediction", "sample", "flow_prediction", or, for the preconditioned outputs of some families, the
    family: "edm", "consistency", "trigflow".
    """
    fixed = READERS[plain_name(scheduler)][1]
    said = fixed or scheduler.config.prediction_type
    return "sample" if said == "original_sample" else said
