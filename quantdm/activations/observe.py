"""Look at the inputs of layers along full-precision trajectories: ranges of static schemes, how far channels reach."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantdm.activations.calibration import protocol_of
from quantdm.activations.equalisers import given_exponents, own_exponents
from quantdm.activations.hooks import activation_spec, set_activation_bits_, timestep_reader
from quantdm.activations.rounding import range_of, turned
from quantdm.denoisers.calls import layer_input
from quantdm.denoisers.inventory import LayerRecord, list_layers
from quantdm.errors import QuantDMError
from quantdm.pipelines.generate import generate
from quantdm.pipelines.loading import DiffusionPipeline
from quantdm.pipelines.parts import get_denoiser
from quantdm.recipe import ActivationScheme, ActivationSpec, CalibrationSpec

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
        QuantDMError: the spec has bits per bucket of timesteps already, nothing is static, more buckets than steps, an
            equalised layer without an equaliser, or an input with NaN (layer and timestep are named).
    """
    if spec.bucket_bits:
        raise QuantDMError("activations: have bits per bucket already; observe ranges first, then give bits to steps")
    denoiser = get_denoiser(pipe)
    spec = spec.observed_of({record.name for record in list_layers(denoiser)})
    rules = spec.model_copy(update={"ranges": {}, "buckets": ()})
    schemes = _without_ranges(rules, list_layers(denoiser))
    static = {name: scheme for name, scheme in schemes.items() if scheme is not None and scheme.static}
    if not static:
        raise QuantDMError("activations: no scheme of the spec is static, there are no ranges to observe")
    exponents = given_exponents(denoiser, spec, list_layers(denoiser), {name: static.get(name) for name in schemes})
    seen: dict[str, dict[float, list[tuple[float, float]]]] = {name: {} for name in static}

    def look(record: LayerRecord, layer: nn.Module, x: Tensor, at: float) -> None:
        scheme, channel = static[record.name], -1 if record.kind == "linear" else 1
        equaliser = exponents.get(record.name, own_exponents(layer)) if scheme.equalised else None
        low, high = range_of(turned(x, scheme, channel, equaliser, record.split), scheme, tuple(range(x.dim())))
        seen[record.name].setdefault(at, []).append((float(low), float(high)))

    run_watched(pipe, calibration, dict.fromkeys(static, look))
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


@dataclass
class _Watcher:
    """Pre-hooks that show every call of some layers together with the timestep of the denoiser's call."""

    watches: Mapping[str, Watch]
    timestep_of: Callable[[tuple[Any, ...], Mapping[str, Any]], float | None]
    at: float = 0.0

    def clock(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        at = self.timestep_of(args, kwargs)
        self.at = 0.0 if at is None else at

    def hook(self, record: LayerRecord) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def show(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = layer_input(record.name, args, kwargs)
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
                layer = denoiser.get_submodule(record.name)
                handles.append(layer.register_forward_pre_hook(watcher.hook(record), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe_reach(pipe: DiffusionPipeline, names: Iterable[str], calibration: CalibrationSpec) -> dict[str, Tensor]:
    """Return max|x| of every input channel of these layers along trajectories, float32 [C_in / groups]."""
    seen: dict[str, Tensor] = {}

    def look(record: LayerRecord, layer: nn.Module, x: Tensor, at: float) -> None:
        channels = x.movedim(-1 if record.kind == "linear" else 1, -1).float().abs().flatten(0, -2).amax(0)
        reach = channels.view(-1, record.shape[1]).amax(0)
        seen[record.name] = torch.maximum(seen.get(record.name, reach), reach)

    watches = dict.fromkeys(names, look)
    if watches:
        run_watched(pipe, calibration, watches)
    return seen


@torch.no_grad()
def run_watched(pipe: DiffusionPipeline, calibration: CalibrationSpec, watches: Mapping[str, Watch]) -> None:
    """Make the images of a calibration while the layers are watched, activation quantization switched off.

    Raises:
        QuantDMError: an input with NaN (layer and timestep are named).
    """
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
