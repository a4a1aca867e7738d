"""Fit a correction on some trajectories, run freely on others, keep the variant that measurably helps."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn

from quantdm.correction.record import VARIANTS, Correction
from quantdm.correction.schedulers import apply_correction, remove_correction
from quantdm.correction.statistics import NoiseStatistics
from quantdm.errors import QuantDMError
from quantdm.pipelines.parts import get_denoiser
from quantdm.recipe import Recipe

# Generates a batch of images (or latents) with a pipeline; called twice it must do the same, so it seeds its noise.
Run = Callable[[DiffusionPipeline], torch.Tensor]
# Another denoiser to put into the pipeline, or a function whose context quantizes the pipeline's own in place.
Network = nn.Module | Callable[[], AbstractContextManager[Any]]

CONFIDENCE = 0.95


def fit_correction(
    pipe: DiffusionPipeline,
    quantized: Network,
    *,
    fit_runs: Sequence[Run],
    test_runs: Sequence[Run] = (),
    distance: Callable[[torch.Tensor, torch.Tensor], float] | None = None,
    variant: str | None = None,
    explained_from: Network | None = None,
    eta: float = 0.0,
    model: str = "",
    recipe: Recipe | None = None,
) -> Correction:
    """Fit the correction of a quantized denoiser and choose its variant by measurement.

    Args:
        pipe: the full-precision pipeline, DDIM or DDPM; it is left as it was.
        quantized: the quantized denoiser, or a function whose context makes the pipeline's own quantized.
        fit_runs: batches of trajectories for the statistics, 64 to 128 in all; each is generated twice.
        test_runs: other batches on which the variants run freely, at least 2, better 4 or more.
        distance: distance(images, full-precision images), lower is better: fid_fp, or a paired error.
        variant: use this one and measure nothing.
        explained_from: the network against which k, bias and q are fitted, if not full precision: the same weights
            without activation quantization leave only activation noise to explain.
        eta: DDIM's eta, for pipelines that pass none.
        model: name of the model, kept in the record.
        recipe: the exact recipe that `quantized` has, kept in the record: an export takes no correction without it.

    Raises:
        QuantDMError: no runs, runs that do not repeat themselves, an unsupported scheduler.
    """
    if not fit_runs or (variant is None and (len(test_runs) < 2 or distance is None)):
        raise QuantDMError(
            f"fit_correction: got {len(fit_runs)} fit_runs, {len(test_runs)} test_runs and distance {distance}; "
            "expected fit_runs, and to choose a variant at least 2 test_runs and a distance; or name the variant"
        )
    statistics = NoiseStatistics()
    with sampling(pipe, None, eta=eta):
        for run in fit_runs:
            collect_(statistics, pipe, run, quantized, explained_from=explained_from)
        config = pipe.scheduler.config
        correction = statistics.correction(
            pipe.scheduler.alphas_cumprod,
            prediction_type=config.prediction_type,
            model=model,
            variant=variant or "both+variance",
        ).fitted_for(recipe)
    if variant is not None:
        return correction
    assert distance is not None
    with sampling(pipe, None, eta=eta):
        references = [run(pipe) for run in test_runs]

    def measure(candidate: Correction | None) -> list[float]:
        with network(pipe, quantized), sampling(pipe, candidate, eta=eta):
            return [distance(run(pipe), ref) for run, ref in zip(test_runs, references, strict=True)]

    return choose_variant(measure, correction)


def choose_variant(
    measure: Callable[[Correction | None], list[float]], correction: Correction, *, variants: Sequence[str] = VARIANTS
) -> Correction:
    """Return the correction with the variant that lowers the distance to full precision beyond noise, else "none".

    From nothing to everything, a variant replaces the best so far when the paired differences of its distances have a
    mean below zero at 95 % (one-sided t test over runs). Variants that cannot differ (no significant k) are left out.

    Args:
        measure: distances to full precision on held-out runs, in the same order every time; None: no correction.
        correction: the fitted statistics.
        variants: those to try.

    Raises:
        QuantDMError: fewer than two distances, or one that is not finite.
    """
    hopeless = {"k", "both"} if not correction.k.any() else set()
    measured: dict[str, list[float]] = {"none": _checked(measure(None))}
    best = "none"
    for variant in variants:
        if variant == "none" or variant in hopeless:
            continue
        measured[variant] = _checked(measure(correction.with_variant(variant)), len(measured["none"]))
        if _is_lower(measured[variant], measured[best]):
            best = variant
    return replace(correction, variant=best, measured=measured)


@torch.no_grad()
def collect_(
    statistics: NoiseStatistics,
    pipe: DiffusionPipeline,
    run: Run,
    quantized: Network,
    *,
    explained_from: Network | None = None,
) -> None:
    """Add to `statistics` the guided outputs of both networks along the full-precision trajectories of a run.

    The run is generated twice. The first time the pipeline's own network answers and every step of the scheduler is
    recorded. The second time the quantized network answers, but the scheduler hands out the recorded steps: the inputs
    stay on the full-precision trajectory, and what arrives at the scheduler is the quantized output as the pipeline
    guides it, so nothing has to be known about guidance, batching or the random noise of the steps.

    Raises:
        QuantDMError: the second pass asks for other steps or starts from other noise than the first.
    """
    with _recorded_steps(pipe) as recorded:
        run(pipe)
    if not recorded:
        raise QuantDMError("fit_correction: a run made no scheduler step; expected a function that calls the pipeline")
    outputs = recorded
    if explained_from is not None:
        with network(pipe, explained_from), _replayed_steps(pipe, recorded) as outputs:
            run(pipe)
    with network(pipe, quantized), _replayed_steps(pipe, recorded) as outputs_q:
        run(pipe)
    if len(outputs_q) != len(recorded):
        raise QuantDMError(
            f"fit_correction: a run made {len(recorded)} steps, then {len(outputs_q)}; expected one that repeats itself"
        )
    statistics.begin()
    for (timestep, output, _, _), (_, output_q, _, _) in zip(outputs, outputs_q, strict=True):
        statistics.update(timestep, output, output_q)


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
def sampling(pipe: DiffusionPipeline, correction: Correction | None, *, eta: float = 0.0) -> Iterator[None]:
    """Sample with this correction (None: plainly) and default eta while the context is open."""
    own = pipe.scheduler
    try:
        remove_correction(pipe)
        apply_correction(pipe, correction, eta=eta)
        yield
    finally:
        pipe.scheduler = own


# (timestep, guided output without copies and variance channels, input of the step, result of the step)
_Step = tuple[int, torch.Tensor, torch.Tensor, Any]


@contextmanager
def _recorded_steps(pipe: DiffusionPipeline) -> Iterator[list[_Step]]:
    steps: list[_Step] = []
    original = pipe.scheduler.step

    @functools.wraps(original)  # pipelines inspect the signature
    def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(model_output, timestep, sample, *args, **kwargs)
        steps.append((int(timestep), _distinct(model_output, sample), sample.clone(), result))
        return result

    with _replaced_step(pipe, step):
        yield steps


@contextmanager
def _replayed_steps(pipe: DiffusionPipeline, recorded: list[_Step]) -> Iterator[list[_Step]]:
    steps: list[_Step] = []

    @functools.wraps(pipe.scheduler.step)
    def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        time, _, expected, result = recorded[min(len(steps), len(recorded) - 1)]
        if int(timestep) != time or not torch.equal(sample, expected):
            raise QuantDMError(
                f"fit_correction: a run differs from its first pass at step {len(steps)} (timestep {int(timestep)}, "
                f"was {time}); expected one that repeats itself: give it fixed seeds"
            )
        steps.append((time, _distinct(model_output, sample), expected, None))
        return result

    with _replaced_step(pipe, step):
        yield steps


@contextmanager
def _replaced_step(pipe: DiffusionPipeline, step: Callable) -> Iterator[None]:
    scheduler = pipe.scheduler
    scheduler.step = step  # an instance attribute that hides the method
    try:
        yield
    finally:
        del scheduler.step


def _distinct(model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Drop what carries no information: variance channels, and the second of two equal halves (DiT's guidance)."""
    output = model_output[:, : sample.shape[1]]
    half = len(sample) // 2
    if len(sample) % 2 == 0 and torch.equal(sample[:half], sample[half:]) and torch.equal(output[:half], output[half:]):
        output = output[:half]
    return output.detach().clone()


def _checked(distances: Sequence[float], count: int | None = None) -> list[float]:
    values = [float(d) for d in distances]
    if len(values) < 2 or (count is not None and len(values) != count) or not all(map(math.isfinite, values)):
        raise QuantDMError(f"choose_variant: got distances {values}, expected the same number each time, >= 2, finite")
    return values


def _is_lower(distances: Sequence[float], reference: Sequence[float]) -> bool:
    from scipy.stats import t as student  # heavy, and only needed here

    gain = np.subtract(reference, distances)
    error = gain.std(ddof=1) / math.sqrt(len(gain))
    return bool(gain.mean() > student.ppf(CONFIDENCE, len(gain) - 1) * error and gain.mean() > 0)
