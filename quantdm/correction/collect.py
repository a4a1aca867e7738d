"""Collect noise statistics: both networks on the same inputs, along full-precision trajectories of a whole pipeline."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from quantdm.correction.levels import level_of
from quantdm.correction.statistics import NoiseStatistics
from quantdm.denoisers.calls import taken_back
from quantdm.errors import QuantDMError
from quantdm.files import digest
from quantdm.pipelines.parts import find_denoisers, get_denoiser

# Generates a batch of images (or latents) with a pipeline; called twice it must do the same, so it seeds its noise.
Run = Callable[[DiffusionPipeline], torch.Tensor]
# Another denoiser to put into the pipeline, or a function whose context quantizes the pipeline's own in place.
Network = nn.Module | Callable[[], AbstractContextManager[Any]]

MAX_MIX_ERROR = 1e-3  # how exactly a guided output must be a mix of two, relative to their difference


@dataclass(frozen=True)
class Halves:
    """The unconditional and the conditional output behind a guided one, and the guidance scale."""

    free: torch.Tensor
    given: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Step:
    """What arrived at a scheduler: the guided output (whole, and once without variance channels) and the sample."""

    log_snr: float
    whole: torch.Tensor
    output: torch.Tensor
    sample: torch.Tensor
    axis: int
    halves: Halves | None
    first: bool  # of a trajectory: a run that makes several calls of the pipeline has several


@torch.no_grad()
def collect_(
    statistics: NoiseStatistics,
    pipe: DiffusionPipeline,
    run: Run,
    quantized: Network,
    *,
    explained_from: Network | None = None,
) -> int:
    """Add to `statistics` the guided outputs of both networks along the full-precision trajectories of a run.

    The run is generated twice. The first time the pipeline's own network answers and what arrives at every step of the
    scheduler is recorded. The second time the quantized network answers, but the scheduler steps on with the recorded
    output: the inputs stay on the full-precision trajectory, and what arrives is the quantized output as the pipeline
    guides it, so nothing has to be known about guidance, batching or the random noise of the steps. With a context as
    `quantized`, one network is in memory at a time.

    Returns:
        The axis of the channels in a sample.

    Raises:
        QuantDMError: no step was made, or the second pass asks for other steps or starts from other noise.
    """
    with _watched_steps(pipe) as recorded:
        run(pipe)
    if not recorded:
        raise QuantDMError("fit_correction: a run made no scheduler step; expected a function that calls the pipeline")
    steps, axis = recorded, recorded[0].axis
    if explained_from is not None:
        with network(pipe, explained_from), _watched_steps(pipe, recorded) as steps:
            run(pipe)
    with network(pipe, quantized), _watched_steps(pipe, recorded) as steps_q:
        run(pipe)
    if len(steps_q) != len(recorded):
        raise QuantDMError(
            f"fit_correction: a run made {len(recorded)} steps, then {len(steps_q)}; expected one that repeats itself"
        )
    for step, step_q in zip(steps, steps_q, strict=True):
        if step.first:
            statistics.begin()
        place = axis % step.output.ndim
        four = None
        if step.halves is not None and step_q.halves is not None:
            mixed = (step.halves.free, step.halves.given, step_q.halves.free, step_q.halves.given)
            four = [half.movedim(place, 1) for half in mixed]
        statistics.update(step.log_snr, step.output.movedim(place, 1), step_q.output.movedim(place, 1), four)
    return axis


def channel_axis(pipe: DiffusionPipeline, sample: torch.Tensor) -> int:
    """Return the axis of the channels in a sample of a pipeline.

    CogVideoX has frames before channels; tokens (FLUX) have as many values each as the denoiser has channels; all else
    has channels first.
    """
    denoiser = get_denoiser(pipe)
    if type(denoiser).__name__.startswith("CogVideoX"):
        return 2
    config = dict(getattr(denoiser, "config", {}))
    widths = (config.get("in_channels"), config.get("out_channels"))
    return -1 if sample.ndim == 3 and sample.shape[-1] in widths else 1


def network_digest(pipe: DiffusionPipeline) -> str:
    """Return the hash of the class and configuration of a pipeline's denoiser, quantized or not."""
    denoiser = get_denoiser(pipe)
    config = {key: value for key, value in dict(getattr(denoiser, "config", {})).items() if not key.startswith("_")}
    config.pop("quantization_config", None)
    return digest(type(denoiser).__name__, {key: str(value) for key, value in sorted(config.items())})


@contextmanager
def network(pipe: DiffusionPipeline, other: Network) -> Iterator[None]:
    """Let another network denoise while the context is open."""
    if not isinstance(other, nn.Module):
        with other():
            yield
        return
    own = get_denoiser(pipe)
    name = next(name for name, part in pipe.components.items() if part is own)
    setattr(pipe, name, other)
    try:
        yield
    finally:
        setattr(pipe, name, own)


@contextmanager
def _watched_steps(pipe: DiffusionPipeline, recorded: Sequence[Step] | None = None) -> Iterator[list[Step]]:
    """Note what arrives at every step; with `recorded` steps the scheduler steps on with their outputs instead."""
    steps: list[Step] = []
    starts: set[int] = set()  # of the calls that `generate` makes
    scheduler = pipe.scheduler
    original = scheduler.step

    @functools.wraps(original)  # pipelines inspect the signature
    def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        level, axis = level_of(scheduler, timestep).log_snr, channel_axis(pipe, sample)
        output = _distinct(model_output, sample, axis)
        halves = _halves(outputs, output, axis)
        whole = model_output
        if recorded is not None:
            first = recorded[min(len(steps), len(recorded) - 1)]
            if level != first.log_snr or not torch.equal(sample, first.sample):
                raise QuantDMError(
                    f"fit_correction: a run differs from its first pass at step {len(steps)} (log-SNR {level:.3f}, was "
                    f"{first.log_snr:.3f}); expected one that repeats itself: give it fixed seeds"
                )
            whole = first.whole
        first = not steps or len(steps) in starts or level < steps[-1].log_snr  # no sampler goes back to more noise
        steps.append(Step(level, whole.clone(), output, sample.clone(), axis, halves, first))
        outputs.clear()
        return original(whole, timestep, sample, *args, **kwargs)

    def mark() -> Callable[[], None]:
        starts.add(made := len(steps))

        def take_back() -> None:
            del steps[made:]
            outputs.clear()

        return take_back

    with ExitStack() as stack:
        outputs = stack.enter_context(_heard_outputs(pipe))
        stack.enter_context(taken_back(find_denoisers(pipe).values(), mark))
        scheduler.step = step  # an instance attribute that hides the method
        stack.callback(scheduler.__dict__.pop, "step")
        yield steps


@contextmanager
def _heard_outputs(pipe: DiffusionPipeline) -> Iterator[list[torch.Tensor]]:
    """Keep what the denoisers answer, as it comes."""
    heard: list[torch.Tensor] = []

    def hear(_module: nn.Module, _args: Any, output: Any) -> None:
        found = output[0] if isinstance(output, (tuple, list)) else getattr(output, "sample", output)
        if isinstance(found, torch.Tensor):
            heard.append(found.detach().clone())

    handles = [part.register_forward_hook(hear) for part in find_denoisers(pipe).values()]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _halves(outputs: Sequence[torch.Tensor], guided: torch.Tensor, axis: int) -> Halves | None:
    """Return the two outputs that a guided one is a mix of; None if it is no mix of two.

    They come as two halves of a batch or as two calls, in either order: the weights tell which is which, as guidance
    goes beyond the conditional output.
    """
    pair = tuple(outputs[0].chunk(2)) if len(outputs) == 1 else tuple(outputs)
    if len(pair) != 2:
        return None
    place, channels = axis % guided.ndim, guided.shape[axis % guided.ndim]
    pair = [half.narrow(place, 0, channels) for half in pair if _holds(half, guided, place)]
    if len(pair) != 2:
        return None
    first, second = (half.double() for half in pair)
    apart, mixed = second - first, guided.double() - first
    size = apart.square().sum()
    if not size > 0:
        return None
    scale = float((apart * mixed).sum() / size)
    if float((mixed - scale * apart).square().sum() / size) ** 0.5 > MAX_MIX_ERROR:
        return None
    return Halves(pair[0], pair[1], scale) if scale >= 0 else Halves(pair[1], pair[0], 1.0 - scale)


def _holds(half: torch.Tensor, guided: torch.Tensor, place: int) -> bool:
    if half.ndim != guided.ndim:
        return False
    shapes = [[size for dim, size in enumerate(t.shape) if dim != place] for t in (half, guided)]
    return shapes[0] == shapes[1] and half.shape[place] >= guided.shape[place]


def _distinct(model_output: torch.Tensor, sample: torch.Tensor, axis: int) -> torch.Tensor:
    """Drop what carries no information: variance channels, and the second of two equal halves (DiT's guidance)."""
    place = axis % sample.ndim
    output = model_output.narrow(place, 0, sample.shape[place])
    half = len(sample) // 2
    if len(sample) % 2 == 0 and torch.equal(sample[:half], sample[half:]) and torch.equal(output[:half], output[half:]):
        output = output[:half]
    return output.detach().clone()
