"""Corrected schedulers: any served diffusers scheduler whose step undoes the quantization noise, made from its class.

A corrected scheduler keeps the plain config and adds one private entry, `_quantdm`. diffusers carries private entries
through `save_pretrained`, `from_pretrained` and `from_config` of every scheduler class: a corrected pipeline is saved
as one with the plain scheduler, which plain diffusers opens; after `import quantdm` it opens corrected.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch.overrides import TorchFunctionMode

from quantdm.correction import multistep
from quantdm.correction.ddim import real_eta
from quantdm.correction.levels import Level, level_of, plain_name, ratio_level
from quantdm.correction.memory import shared_after, with_memory
from quantdm.correction.moves import Step, step_of
from quantdm.correction.record import Correction, StepCorrection
from quantdm.correction.variance import ROOMS, Move, Room, epsilon_units
from quantdm.errors import QuantDMError

KEY = "_quantdm"
_DRAWS = (torch.randn, torch.randn_like)


class _ScaledNoise(TorchFunctionMode):
    """Multiply the normal noise that is drawn while the context is open: a step keeps all else as it is."""

    def __init__(self, factor: float | torch.Tensor) -> None:
        super().__init__()
        self.factor = factor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return (out * self.factor).to(out.dtype) if func in _DRAWS else out


@dataclass(frozen=True)
class Did:
    """What a corrected step has done: its level, mean correction, remaining std of e, move and room (None: none)."""

    level: Level
    at: StepCorrection
    q: float
    move: Move | None
    room: Room | None


class CorrectedScheduler(SchedulerMixin, ConfigMixin):
    """What corrected schedulers share: the correction and the default eta, read from the config, and the step."""

    did: Did | None = None

    @property
    def correction(self) -> Correction | None:
        """The correction that is applied."""
        record = self.config.get(KEY, {}).get("correction")
        if record is None:
            return None
        parsed = self.__dict__.get("_parsed")
        if parsed is None or parsed[0] is not record:
            parsed = self.__dict__["_parsed"] = (record, Correction.from_dict(record))
        return parsed[1]

    @property
    def default_eta(self) -> float:
        """The eta of a DDIM step that is given none (DiTPipeline gives none)."""
        return self.config.get(KEY, {}).get("eta", 0.0)

    def remaining_std(self, level: Level) -> float:
        """Return q, the std in units of e of the noise that the mean correction leaves; 0 if it is not used."""
        correction = self.correction
        if correction is None or correction.room is None:
            return 0.0
        at = self.correction_at(correction, level)
        return at.q * epsilon_units(correction.prediction_type, level.sigma)

    def correction_at(self, correction: Correction, level: Level) -> StepCorrection:
        """Return what the correction undoes at a level; a schedule's levels come again with every sample."""
        known = self.__dict__.get("_known")
        if known is None or known[0] is not correction:
            known = self.__dict__["_known"] = (correction, {})
        if level.log_snr not in known[1]:
            known[1][level.log_snr] = correction.at(level.log_snr)
        return known[1][level.log_snr]

    def make_room(self, move: Move) -> Room:
        """Return how the step that is this move makes room for the noise."""
        correction = self.correction
        assert correction is not None
        assert correction.room is not None
        before = self.__dict__.get("_excess", (-1, 0.0))
        excess = before[1] if before[0] == move.sigma else 0.0  # of the step that ended here
        self.__dict__["_excess"] = (move.sigma_next, move.added)
        return ROOMS[correction.room](move, excess)

    def remembering(self, step: Step) -> Move:
        """Return a step's move, with what its noise shares with that of the steps before where a variant counts it."""
        correction = self.correction
        assert correction is not None
        if correction.room != "full":
            return step.move
        start, end, shared = self.__dict__.get("_carried", (math.nan, math.nan, 0.0))
        # Some spacings start a step beside the end of the one before. Farther off: not corrected, or another image.
        near = step.move.sigma == end or abs(step.move.sigma - end) <= 0.5 * (start - end)
        shared = shared if near else 0.0
        here, after = correction.age_at(step.start.log_snr), correction.age_at(step.end.log_snr)
        correlated = 0.0 if here is None or after is None else math.exp(-abs(after - here))
        self.__dict__["_carried"] = (step.move.sigma, step.move.sigma_next, shared_after(step.move, shared, correlated))
        return with_memory(step.move, shared)


def corrected_step(scheduler: Any, plain: Callable, call: inspect.BoundArguments) -> Any:
    """Take the plain scheduler's step on the corrected output, with room for the noise that remains."""
    correction: Correction | None = scheduler.correction
    values = call.arguments
    if correction is None or correction.variant == "none":
        return plain(*call.args, **call.kwargs)
    if values.get("per_token_timesteps") is not None:
        raise QuantDMError("correction: got per_token_timesteps, expected one noise level per step; remove it")
    here, sample = level_of(scheduler, values["timestep"]), values["sample"]
    at = scheduler.correction_at(correction, here)
    values["model_output"] = correct_mean(correction, at, values["model_output"], sample)
    q = scheduler.remaining_std(here)
    scheduler.did = Did(here, at, q, None, None)
    step = None
    if correction.room is not None and correction.is_within(here.log_snr):
        step = step_of(scheduler, values, here, scheduler.remaining_std)
    if step is None:  # mean only, or a multistep solver, whose updates make room themselves
        return plain(*call.args, **call.kwargs)
    move = scheduler.remembering(step)
    room = scheduler.make_room(move)
    scheduler.did = Did(here, at, q, move, room)
    if not room.acts:
        return plain(*call.args, **call.kwargs)
    if values.get("variance_noise") is not None:
        values["variance_noise"] = values["variance_noise"] * room.noise
    unscaled = not isinstance(room.noise, torch.Tensor) and room.noise == 1.0
    with nullcontext() if unscaled else _ScaledNoise(room.noise):
        result = plain(*call.args, **call.kwargs)
    if room.length == 1.0:
        return result
    start, ratio = sample if step.sample is None else step.sample, step.end.signal / step.start.signal
    return _with_sample(result, lambda new: lengthened(new, start, ratio, room.length))


def lengthened(new: torch.Tensor, start: torch.Tensor, ratio: float, length: float) -> torch.Tensor:
    """Return the end of a step that is `length` times as long: x / signal moves along a straight line."""
    wide = torch.promote_types(new.dtype, torch.float32)
    base = start.to(wide) * ratio
    return (base + (new.to(wide) - base) * length).to(new.dtype)


def _with_sample(result: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(result, tuple):
        return (change(result[0]), *result[1:])
    result.prev_sample = change(result.prev_sample)
    return result


def correct_mean(
    correction: Correction, at: StepCorrection, output: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor:
    """Return gain_c (output - bias_c) on the channels of the sample (further ones predict a variance)."""
    axis = correction.axis % sample.ndim
    channels = sample.shape[axis]
    if correction.channels != channels:
        raise QuantDMError(
            f"correction of model {correction.model!r} is for {correction.channels} channels, the sample has "
            f"{channels}: it belongs to another model; fit one with `fit_correction`"
        )
    if at.is_nothing:
        return output
    head = output.narrow(axis, 0, channels)
    wide = head.to(torch.promote_types(head.dtype, torch.float32))
    shape = [-1 if dim == axis else 1 for dim in range(head.ndim)]
    gain, bias = (torch.as_tensor(v, dtype=wide.dtype, device=wide.device).view(shape) for v in (at.gain, at.bias))
    fixed = ((wide - bias) * gain).to(head.dtype)
    if output.shape[axis] == channels:
        return fixed
    return torch.cat([fixed, output.narrow(axis, channels, output.shape[axis] - channels)], dim=axis)


@functools.cache
def corrected_class(plain: type) -> type:
    """Return the corrected class of a diffusers scheduler: the same signature, config and serialisation."""
    signature = inspect.signature(plain.step)

    @functools.wraps(plain.step)  # pipelines inspect the signature for `eta` and `generator`
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        if "use_clipped_model_output" in signature.parameters:  # the DDIM family
            call.arguments["eta"] = real_eta(self, call.arguments)
        return corrected_step(self, plain.step, call)

    names = multistep.UPDATES.get(plain.__name__, ())
    updates = {name: _corrected_update(getattr(plain, name), name) for name in names}
    # It goes by the plain class's name and module, which is what model_index.json and scheduler_config.json will say.
    names = {"__module__": plain.__module__, "__qualname__": f"Corrected{plain.__name__}"}
    return type(plain.__name__, (CorrectedScheduler, plain), {"step": step, **updates, **names})


def _corrected_update(plain: Callable, name: str) -> Callable:
    """Return an update of a multistep solver that makes room for the noise of all outputs it uses."""
    corrector = name == "multistep_uni_c_bh_update"

    @functools.wraps(plain)
    def update(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        correction: Correction | None = self.correction
        did: Did | None = self.did
        if correction is None or correction.room is None or did is None or not correction.is_within(did.level.log_snr):
            return plain(self, *args, **kwargs)
        memo, key = _memo(self), (name, self.step_index, kwargs.get("order"))
        if key not in memo:
            memo[key] = _weights(self, plain, args, kwargs, corrector)
        own = memo[key]
        if own is None:
            return plain(self, *args, **kwargs)
        history = self.__dict__.setdefault("_history", (-1, multistep.History()))
        goes_on = self.lower_order_nums > 0 and history[0] in (self.step_index, self.step_index - 1)
        known = history[1] if goes_on else multistep.History()
        base = known.last if corrector else known.now
        key = (correction, *key, *base.items())
        if key not in memo:
            level_at, age = partial(_level_at, self, memo), partial(_age_at, correction)
            memo[key] = multistep.move_of_update(self, own, base, self.remaining_std, level_at, age)
        move, here, after, carried = memo[key]
        self.__dict__["_history"] = (self.step_index, multistep.History(carried, known.last if corrector else base))
        room = self.make_room(move)
        if not corrector:
            self.did = Did(did.level, did.at, did.q, move, room)
        if kwargs.get("noise") is not None and room.acts:
            kwargs["noise"] = kwargs["noise"] * room.noise
        new = plain(self, *args, **kwargs)
        start = kwargs["last_sample"] if corrector else kwargs["sample"]
        return new if room.length == 1.0 else lengthened(new, start, after.signal / here.signal, room.length)

    return update


def _age_at(correction: Correction, level: Level) -> float | None:
    """Return the age of the noise at a level, where the variant counts it."""
    return correction.age_at(level.log_snr) if correction.room == "full" else None


def _memo(self: Any) -> dict[Any, Any]:
    """Return what has been worked out for this schedule: levels and weights depend on its sigmas alone."""
    known = self.__dict__.get("_worked_out")
    if known is None or known[0].shape != self.sigmas.shape or not torch.equal(known[0], self.sigmas):
        known = self.__dict__["_worked_out"] = (self.sigmas.clone(), {})
    return known[1]


def _level_at(self: Any, memo: dict[Any, Any], index: int) -> Level:
    if index not in memo:
        memo[index] = ratio_level(self, index)
    return memo[index]


def _weights(self: Any, plain: Callable, args: tuple, kwargs: dict[str, Any], corrector: bool) -> Any:
    """Return what an update multiplies outputs and noise with; None where its end is no finite step."""
    listed = plain_name(self) == "UniPCMultistepScheduler"
    given = self.model_outputs if listed else args[0] if isinstance(args[0], Sequence) else [args[0]]
    count = len(given) + corrector
    own = self.model_outputs if listed else None

    def run(outputs: Sequence[torch.Tensor], sample: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        settings = {key: value for key, value in kwargs.items() if key not in ("model_output", "noise")}
        if corrector:
            self.model_outputs = list(outputs[:-1])
            return plain(self, **{**settings, "this_model_output": outputs[-1], "last_sample": sample,
                                  "this_sample": sample})  # fmt: skip
        if listed:
            self.model_outputs = list(outputs)
            return plain(self, model_output=outputs[-1], **{**settings, "sample": sample})
        fresh = {"noise": noise} if kwargs.get("noise") is not None else {}
        first = list(outputs) if isinstance(args[0], Sequence) else outputs[0]
        return plain(self, first, **{**settings, "sample": sample, **fresh})

    try:
        *weights, fresh = multistep.probe(run, count)
    finally:
        if listed:
            self.model_outputs = own
    index = self.step_index
    if not all(map(math.isfinite, [*weights, fresh])):
        return None
    outputs = {index - count + 1 + place: weight for place, weight in enumerate(weights) if weight != 0.0}
    start, end = (index - 1, index) if corrector else (index, index + 1)
    return multistep.Update(start, end, outputs, fresh)
