"""Look at the inputs of layers along full-precision trajectories: static ranges, and the best scheme of a layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantdm.activations.calibration import protocol_of
from quantdm.activations.handover import quantize_input
from quantdm.activations.hooks import activation_spec, first_input, set_activation_bits_, timestep_reader
from quantdm.activations.rounding import range_of
from quantdm.denoisers.inventory import LayerRecord, list_layers
from quantdm.errors import QuantDMError
from quantdm.pipelines.generate import generate
from quantdm.pipelines.loading import DiffusionPipeline
from quantdm.pipelines.parts import get_denoiser
from quantdm.recipe import ActivationScheme, ActivationSpec, CalibrationSpec

# What to try against outliers, the simplest first: a later one is taken only if it errs clearly less.
VARIANTS: tuple[str, ...] = ("", "-mse", "-hadamard", "-outliers8")
CLEARLY = 0.9  # of the error of the simplest
Watch = Callable[[LayerRecord, nn.Module, Tensor, float], None]


def observe_ranges(
    pipe: DiffusionPipeline, spec: ActivationSpec, calibration: CalibrationSpec, *, buckets: int = 1
) -> ActivationSpec:
    """Return a spec with the ranges that its static schemes need, seen along trajectories of the pipeline.

    Args:
        pipe: runs as it is, without activation quantization; it is left as it was.
        spec: rules; the ranges of its static layers are replaced.
        calibration: which images are made.
        buckets: ranges of timesteps, of equally many steps, that have ranges of their own.

    Raises:
        QuantDMError: the spec has bits per bucket of timesteps already, nothing is static, more buckets than steps, or
            an input with NaN (layer and timestep are named).
    """
    if spec.bucket_bits:
        raise QuantDMError("activations: have bits per bucket already; observe ranges first, then give bits to steps")
    denoiser = get_denoiser(pipe)
    rules = spec.model_copy(update={"ranges": {}, "buckets": ()})
    schemes = _without_ranges(rules, list_layers(denoiser))
    static = {name: scheme for name, scheme in schemes.items() if scheme is not None and scheme.static}
    if not static:
        raise QuantDMError("activations: no scheme of the spec is static, there are no ranges to observe")
    seen: dict[str, dict[float, list[tuple[float, float]]]] = {name: {} for name in static}

    def look(record: LayerRecord, layer: nn.Module, x: Tensor, at: float) -> None:
        low, high = range_of(x.float(), static[record.name], tuple(range(x.dim())))
        seen[record.name].setdefault(at, []).append((float(low), float(high)))

    _run(pipe, calibration, dict.fromkeys(static, look))
    times = sorted({at for by_time in seen.values() for at in by_time}, reverse=True)
    if not 1 <= buckets <= len(times):
        raise QuantDMError(f"buckets: got {buckets}, expected 1 to {len(times)}, the timesteps of these images")
    ends = [len(times) * i // buckets for i in range(buckets + 1)]
    groups = [times[first:last] for first, last in pairwise(ends)]
    ranges = {
        name: tuple(_joined([pair for t in group for pair in by_time.get(t, ())], static[name]) for group in groups)
        for name, by_time in seen.items()
    }
    # Between two buckets lies the last timestep of the earlier one, so that other samplers' timesteps fall in as well.
    bounds = tuple(group[-1] for group in groups[:-1])
    return spec.model_copy(update={"ranges": ranges, "buckets": bounds})


def choose_activations(
    pipe: DiffusionPipeline, spec: ActivationSpec, calibration: CalibrationSpec, *, variants: Sequence[str] = VARIANTS
) -> tuple[ActivationSpec, dict[str, dict[str, float]]]:
    """Return a spec in which every layer takes the variant of its scheme that errs least, and all the errors.

    The error is that of the layer's output on its input along trajectories, |y_hat - y|^2 / |y|^2, with the weights
    that the layer has. Bits and granularity stay; a variant is taken if it errs less than .9 of the simplest.

    Args:
        pipe, calibration: as in `observe_ranges`.
        spec: the schemes to start from; layers that are static or original are left alone.
        variants: what is put behind a label, "" for the label alone.

    Returns:
        The spec with an exact scheme for every layer, and layer -> label -> error.

    Raises:
        QuantDMError: a variant is no label, or an input has NaN (layer and timestep are named).
    """
    denoiser = get_denoiser(pipe)
    schemes = spec.resolve(list_layers(denoiser))
    tried = {
        name: [ActivationScheme.parse(f"{scheme.granularity}-{scheme.bits}{variant}") for variant in variants]
        for name, scheme in schemes.items()
        if scheme is not None and not scheme.static
    }
    sums = {name: dict.fromkeys((s.label for s in options), 0.0) for name, options in tried.items()}
    energy = dict.fromkeys(tried, 0.0)

    def compare(record: LayerRecord, layer: nn.Module, x: Tensor, at: float) -> None:
        exact = layer.forward(x)
        energy[record.name] += float(exact.float().square().sum())
        for scheme in tried[record.name]:
            error = layer.forward(quantize_input(x, record, scheme)) - exact
            sums[record.name][scheme.label] += float(error.float().square().sum())

    _run(pipe, calibration, dict.fromkeys(tried, compare))
    errors = {name: {k: v / (energy[name] or 1.0) for k, v in by.items()} for name, by in sums.items()}
    chosen: dict[str, str | None] = {name: None if s is None else s.label for name, s in schemes.items()}
    for name, by_label in errors.items():
        simplest, least = next(iter(by_label)), min(by_label, key=lambda label: by_label[label])
        chosen[name] = least if by_label[least] < CLEARLY * by_label[simplest] else simplest
    update = {"default": None, "types": {}, "patterns": {}, "layers": chosen}
    return spec.model_copy(update=update), errors


@dataclass
class _Watcher:
    """Pre-hooks that show every call of some layers together with the timestep of the denoiser's call."""

    watches: Mapping[str, Watch]
    timestep_of: Callable[[tuple[Any, ...], Mapping[str, Any]], float | None]
    at: float = 0.0

    def clock(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        at = self.timestep_of(args, kwargs)
        self.at = 0.0 if at is None else at

    def hook(self, record: LayerRecord) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def show(layer: nn.Module, args: tuple[Any, ...]) -> None:
            x = first_input(record.name, args)[0]
            if not torch.isfinite(x).all():
                raise QuantDMError(
                    f"{record.name}: its input is not finite at timestep {self.at:g}; check the pipeline, or run it in "
                    "float32"
                )
            self.watches[record.name](record, layer, x, self.at)

        return show


@contextmanager
def _watching(denoiser: nn.Module, watches: Mapping[str, Watch]) -> Iterator[None]:
    watcher = _Watcher(watches, timestep_reader(denoiser))
    handles = [denoiser.register_forward_pre_hook(watcher.clock, with_kwargs=True)]
    try:
        for record in list_layers(denoiser):
            if record.name in watches:
                handles.append(denoiser.get_submodule(record.name).register_forward_pre_hook(watcher.hook(record)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _run(pipe: DiffusionPipeline, calibration: CalibrationSpec, watches: Mapping[str, Watch]) -> None:
    """Make the images of a calibration while the layers are watched, activation quantization switched off."""
    denoiser = get_denoiser(pipe)
    before = activation_spec(denoiser)
    seeds = range(calibration.first_seed, calibration.first_seed + calibration.images)
    with ExitStack() as stack:
        stack.callback(set_activation_bits_, denoiser, before)
        set_activation_bits_(denoiser, None)
        stack.enter_context(_watching(denoiser, watches))
        generate(pipe, protocol_of(calibration), seeds, steps=calibration.steps)


def _without_ranges(spec: ActivationSpec, records: Sequence[LayerRecord]) -> dict[str, ActivationScheme | None]:
    """Return the schemes of layers as if all ranges were there."""
    return spec.model_copy(update={"ranges": {r.name: ((0.0, 1.0),) for r in records}}).resolve(records)


def _joined(pairs: Sequence[tuple[float, float]], scheme: ActivationScheme) -> tuple[float, float]:
    """Return one range of many: the hull of minima and maxima; the mean of percentiles and clipped ranges."""
    low, high = np.array(pairs).T if pairs else (np.zeros(1), np.zeros(1))
    if scheme.range is None:
        return float(low.min()), float(high.max())
    return float(low.mean()), float(high.mean())
