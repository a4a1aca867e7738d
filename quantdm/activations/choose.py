"""What a layer takes against outliers in its input: the remedy with the least error of its output, measured."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from quantdm.activations.equalisers import own_exponents
from quantdm.activations.handover import quantize_input
from quantdm.activations.observe import observe_reach, run_watched
from quantdm.denoisers.inventory import LayerRecord, list_layers
from quantdm.modules import PackedLayer
from quantdm.pipelines.loading import DiffusionPipeline
from quantdm.pipelines.parts import get_denoiser
from quantdm.quantizers.equaliser import exponents_of, to_letters
from quantdm.recipe import ActivationScheme, ActivationSpec, CalibrationSpec

# What to try against outliers, the simplest first: a later one is taken only if it errs clearly less. Clipped ranges
# (-mse) are not among them: at 4 bits they make outputs better and images worse (docs/activations.md, Measured).
VARIANTS: tuple[str, ...] = ("", "-hadamard", "-equalised", "-outliers8")
CLEARLY = 0.9  # of the error of the simplest
SHARES = (0.5, 0.75, 1.0)  # of the activations' spread that an equaliser moves into the weight


class _Candidate(NamedTuple):
    scheme: ActivationScheme
    exponents: Tensor | None = None


def choose_activations(
    pipe: DiffusionPipeline, spec: ActivationSpec, calibration: CalibrationSpec, *, variants: Sequence[str] = VARIANTS
) -> tuple[ActivationSpec, dict[str, dict[str, float]]]:
    """Return a spec in which every layer takes the variant of its scheme that errs least, and all the errors.

    The error is that of the layer's output on its input along trajectories, |y_hat - y|^2 / |y|^2, with the weights
    that the layer has. Bits and granularity stay; a variant is taken if it errs less than .9 of the simplest. An
    equaliser is that of the weight, or the best of three, which then stands in the spec.

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
    spec = spec.observed_of({record.name for record in list_layers(denoiser)})
    schemes = spec.resolve(list_layers(denoiser))
    tried = {
        name: [ActivationScheme.parse(f"{scheme.granularity}-{scheme.bits}{variant}") for variant in variants]
        for name, scheme in schemes.items()
        if scheme is not None and not scheme.static
    }
    candidates = _candidates(pipe, calibration, tried)
    errors = _measure(pipe, calibration, candidates)
    chosen: dict[str, str | None] = {name: None if s is None else s.label for name, s in schemes.items()}
    equalisers = dict(spec.equalisers)
    for name, found in errors.items():
        least = min(range(len(found)), key=found.__getitem__)
        taken = candidates[name][least if found[least] < CLEARLY * found[0] else 0]
        chosen[name] = taken.scheme.label
        equalisers.pop(name, None)
        if taken.exponents is not None:
            equalisers[name] = to_letters(taken.exponents)
    update = {"default": None, "types": {}, "patterns": {}, "layers": chosen, "equalisers": equalisers}
    return spec.model_copy(update=update), {name: _by_label(candidates[name], found) for name, found in errors.items()}


def _by_label(candidates: Sequence[_Candidate], errors: Sequence[float]) -> dict[str, float]:
    """Return the least error of every scheme."""
    least: dict[str, float] = {}
    for candidate, error in zip(candidates, errors, strict=True):
        label = candidate.scheme.label
        least[label] = min(error, least.get(label, error))
    return least


def _candidates(
    pipe: DiffusionPipeline, calibration: CalibrationSpec, tried: Mapping[str, Sequence[ActivationScheme]]
) -> dict[str, list[_Candidate]]:
    """Return what is measured for every layer: its schemes, equalised ones with several equalisers."""
    denoiser = get_denoiser(pipe)
    layers = {name: denoiser.get_submodule(name) for name in tried}
    free = [name for name in tried if any(s.equalised for s in tried[name]) and own_exponents(layers[name]) is None]
    reach = observe_reach(pipe, free, calibration)
    found = {}
    for name, schemes in tried.items():
        equalisers: list[Tensor | None] = [None]
        if name in reach:
            layer = layers[name]
            weight: Tensor = layer.dequantize() if isinstance(layer, PackedLayer) else layer.weight  # type: ignore[assignment]
            equalisers = [exponents_of(reach[name], weight, share) for share in SHARES]
        found[name] = [_Candidate(s, e) for s in schemes for e in (equalisers if s.equalised else [None])]
    return found


def _measure(
    pipe: DiffusionPipeline, calibration: CalibrationSpec, candidates: Mapping[str, Sequence[_Candidate]]
) -> dict[str, list[float]]:
    """Return the relative squared error of the output of every layer under every candidate."""
    sums = {name: [0.0] * len(options) for name, options in candidates.items()}
    energy = dict.fromkeys(candidates, 0.0)

    def compare(record: LayerRecord, layer: nn.Module, x: Tensor, at: float) -> None:
        exact = layer.forward(x)
        energy[record.name] += float(exact.float().square().sum())
        for number, (scheme, exponents) in enumerate(candidates[record.name]):
            if scheme.equalised and exponents is None:
                exponents = own_exponents(layer)
            error = layer.forward(quantize_input(x, record, scheme, exponents=exponents)) - exact
            sums[record.name][number] += float(error.float().square().sum())

    run_watched(pipe, calibration, dict.fromkeys(candidates, compare))
    return {name: [error / (energy[name] or 1.0) for error in found] for name, found in sums.items()}
