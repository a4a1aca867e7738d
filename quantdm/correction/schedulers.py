"""Give a pipeline its corrected scheduler, and take it away again."""

import functools
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from quantdm.correction.collect import network_digest
from quantdm.correction.corrected import KEY, CorrectedScheduler, corrected_class
from quantdm.correction.levels import READERS, check_served, plain_name, prediction_of
from quantdm.correction.record import Correction
from quantdm.errors import QuantDMError
from quantdm.registration import BEFORE

_MARK = "_quantdm_corrects"


def __getattr__(name: str) -> type:
    """Return the corrected class of that name, e.g. CorrectedDDIMScheduler: old pipelines name it in their index."""
    plain = name.removeprefix("Corrected")
    if plain == name or plain not in READERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return corrected_class(getattr(diffusers, plain))


def register_schedulers() -> None:
    """Let diffusers open a scheduler that was saved corrected as a corrected one; again changes nothing.

    diffusers has no door for this: `from_pretrained`, which all schedulers share, is wrapped. Only what has our entry
    in its config is touched.
    """
    found: Any = SchedulerMixin.from_pretrained
    if hasattr(found.__func__, _MARK):
        return
    plain = getattr(found.__func__, BEFORE, found.__func__)

    @functools.wraps(plain)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = plain(cls, *args, **kwargs)
        if isinstance(loaded, tuple):
            return (_as_saved(loaded[0]), *loaded[1:])
        return _as_saved(loaded)

    setattr(from_pretrained, _MARK, True)
    SchedulerMixin.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment]


def _as_saved(scheduler: Any) -> Any:
    if KEY not in scheduler.config or isinstance(scheduler, CorrectedScheduler) or not is_served(scheduler):
        return scheduler
    made: Any = corrected_class(type(scheduler))
    return made.from_config({key: value for key, value in scheduler.config.items() if key != "_class_name"})


def is_served(scheduler: SchedulerMixin) -> bool:
    """Say whether a scheduler, corrected already or not, can be corrected."""
    return plain_name(scheduler) in READERS


def check_corrects(pipe: DiffusionPipeline) -> None:
    """Check that a pipeline has a scheduler that can be corrected.

    Raises:
        QuantDMError: it has none, or one that cannot be (those that can are listed).
    """
    if getattr(pipe, "scheduler", None) is None:
        raise QuantDMError(
            f"correction: {type(pipe).__name__} has no scheduler, expected a pipeline that samples with one"
        )
    check_served(pipe.scheduler)


def apply_correction(
    pipe: DiffusionPipeline, correction: Correction | None, *, eta: float | None = None
) -> DiffusionPipeline:
    """Give a pipeline the corrected scheduler of its own class and config, in place; it saves and loads with it.

    Args:
        pipe: a pipeline with a scheduler that is served, corrected already or not.
        correction: what to undo (None: nothing, only the default eta).
        eta: default eta of DDIM for pipelines that pass none (None: as it is).

    Returns:
        The same pipeline.

    Raises:
        QuantDMError: there is no scheduler, it is not served (those that are get listed), or it does not fit the
            correction.
    """
    check_corrects(pipe)
    scheduler = pipe.scheduler
    plain = plain_class(scheduler)
    if correction is not None:
        _check_fits(pipe, correction)
    if eta is not None and (not 0.0 <= eta <= 1.0 or (not _takes_eta(plain) and eta > 0)):
        raise QuantDMError(f"correction: got eta {eta} for {plain.__name__}, expected 0 to 1 and DDIMScheduler")
    record = {
        "correction": None if correction is None else correction.to_dict(),
        "eta": scheduler.config.get(KEY, {}).get("eta", 0.0) if eta is None else eta,
    }
    made: Any = corrected_class(plain)
    pipe.scheduler = made.from_config({**plain_config(scheduler), KEY: record})
    return pipe


def _check_fits(pipe: DiffusionPipeline, correction: Correction) -> None:
    scheduler = pipe.scheduler
    predicts = prediction_of(scheduler)
    if predicts != correction.prediction_type:
        raise QuantDMError(
            f"correction of model {correction.model!r} was fitted on {correction.prediction_type} predictions, the "
            f"scheduler has {predicts}; it belongs to another model or family of schedulers"
        )
    if correction.network and correction.network != network_digest(pipe):
        raise QuantDMError(
            f"correction of model {correction.model!r} was fitted on another denoiser than this pipeline's; fit one "
            "with `fit_correction`"
        )
    if correction.room is not None and scheduler.config.get("variance_type") == "fixed_large_log":
        raise QuantDMError(
            "correction: the variance of variance_type 'fixed_large_log' cannot be lowered; take variant 'both' or "
            "variance_type 'fixed_large'"
        )


def remove_correction(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Put the plain scheduler back, in place; a pipeline that has no correction stays as it is."""
    if isinstance(pipe.scheduler, CorrectedScheduler):
        plain: Any = plain_class(pipe.scheduler)
        pipe.scheduler = plain.from_config(plain_config(pipe.scheduler))
    return pipe


def plain_class(scheduler: Any) -> type:
    """Return the diffusers class of a scheduler, corrected or not."""
    return type(scheduler).__mro__[2] if isinstance(scheduler, CorrectedScheduler) else type(scheduler)


def _takes_eta(plain: type) -> bool:
    return plain.__name__ in ("DDIMScheduler", "DDIMParallelScheduler")


def plain_config(scheduler: Any) -> dict[str, Any]:
    """Return the configuration of a scheduler without what quantdm keeps in it."""
    return {key: value for key, value in scheduler.config.items() if key not in (KEY, "_class_name")}
