"""Give a pipeline its corrected scheduler, and take it away again."""

from typing import Any, cast

from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from quantdm.correction.corrected import KEY, CorrectedScheduler
from quantdm.correction.ddim import CorrectedDDIMScheduler
from quantdm.correction.ddpm import CorrectedDDPMScheduler
from quantdm.correction.record import Correction
from quantdm.errors import QuantDMError

_CORRECTED: dict[type, type[CorrectedScheduler]] = {
    DDIMScheduler: CorrectedDDIMScheduler,
    DDPMScheduler: CorrectedDDPMScheduler,
}
_PLAIN: dict[type, type] = {corrected: plain for plain, corrected in _CORRECTED.items()}


def is_served(scheduler: SchedulerMixin) -> bool:
    """Say whether a scheduler, corrected already or not, can be corrected."""
    return _PLAIN.get(type(scheduler), type(scheduler)) in _CORRECTED


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
        "eta": scheduler.config.get(KEY, {}).get("eta", 0.0) if eta is None else eta,
    }
    pipe.scheduler = _CORRECTED[plain].from_config({**_plain_config(scheduler), KEY: record})
    return pipe


def remove_correction(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Put the plain scheduler back, in place; a pipeline that has no correction stays as it is."""
    plain = _PLAIN.get(type(pipe.scheduler))
    if plain is not None:
        pipe.scheduler = cast(Any, plain).from_config(_plain_config(pipe.scheduler))
    return pipe


def _plain_config(scheduler: SchedulerMixin) -> dict[str, Any]:
    return {key: value for key, value in cast(Any, scheduler).config.items() if key not in (KEY, "_class_name")}
