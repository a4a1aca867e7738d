"""One-layer noise errors of a search: measured, or told from one measured option by the error of the layer's output.

The noise error of an option is how far the denoiser's output is from full precision when this layer alone takes it. Its
cause is the error of the layer's own output, tr(E H E^T), which calibration knows for every option without running the
denoiser; how much of it arrives at the end is a matter of the layer, hardly of the option. So the error of one option,
measured, tells those of all the others in proportion, and two or more bound what is between them.
"""

from collections.abc import Collection, Mapping, Sequence
from math import exp, log

import numpy as np

from quantdm.denoisers.inventory import LayerRecord
from quantdm.files import read_json, write_json
from quantdm.progress import bar
from quantdm.quantizers.branches import fits_rank
from quantdm.runs.bank import WeightBank
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import Probe
from quantdm.runs.run import Run
from quantdm.schemes import ORIGINAL
from quantdm.surrogates import SearchSpace

VERSION = 1
SENSITIVITY_FILE = "sensitivity.json"
NOTHING = 1e-30  # stands for an error of zero in a logarithm


def one_layer_errors(
    run: Run, engine: Engine, layers: Sequence[LayerRecord], bank: WeightBank
) -> dict[str, dict[str, float]]:
    """Return layer -> label -> one-layer noise error; what sensitivity.json has is not measured again."""
    outputs = {layer.name: _output_errors(run, layer, bank) for layer in layers}
    measured = _measured(run, engine, layers, outputs)
    return {layer.name: completed(measured[layer.name], outputs[layer.name]) for layer in layers}


def probed(outputs: Mapping[str, float | None], count: int | None) -> list[str]:
    """Return the options of a layer that are measured: `count` of them, spread evenly over the output errors.

    All are where `count` is None, or where the output error of one is not known (None).
    """
    if count is None or count >= len(outputs) or None in outputs.values():
        return [*outputs]
    order = sorted(outputs, key=lambda label: outputs[label] or 0.0)
    return [order[int((place + 0.5) * len(order) / count)] for place in range(count)]


def completed(measured: Mapping[str, float], outputs: Mapping[str, float | None]) -> dict[str, float]:
    """Return the noise error of every option: as measured, else told by the output errors of a layer.

    Outside of what was measured it is in proportion to the output error, between two measured options a power of it.
    """
    told = {label: output for label, output in outputs.items() if output is not None}  # else all are measured
    known = sorted((output, measured[label]) for label, output in told.items() if label in measured)
    return {label: _told(output, known) for label, output in told.items() if label not in measured} | dict(measured)


def _told(output: float, known: Sequence[tuple[float, float]]) -> float:
    xs = [log(max(x, NOTHING)) for x, _ in known]
    ys = np.maximum.accumulate([log(max(y, NOTHING)) for _, y in known])  # more error does no good: that was chance
    at = log(max(output, NOTHING))
    beyond = min(at - xs[0], 0.0) + max(at - xs[-1], 0.0)
    return 0.0 if output == 0 else exp(float(np.interp(at, xs, ys)) + beyond)


def _output_errors(run: Run, layer: LayerRecord, bank: WeightBank) -> dict[str, float | None]:
    schemes = [s for s in run.settings.schemes if s != ORIGINAL and fits_rank(layer.shape, s)]
    return {scheme.label: bank.output_error(layer.name, scheme) for scheme in schemes}


def _measured(
    run: Run, engine: Engine, layers: Sequence[LayerRecord], outputs: Mapping[str, Mapping[str, float | None]]
) -> dict[str, dict[str, float]]:
    errors, options = _known_errors(run), run.settings.schemes
    todo = []
    for layer in layers:
        row = errors.setdefault(layer.name, {})
        row |= {ORIGINAL.label: 0.0} if ORIGINAL in options else {}
        left = _left(row, outputs[layer.name], run.settings.noise_options)
        todo += [Probe(layer.name, left)] if left else []
    with bar(len(layers), "sensitivity: layer by layer") as progress:
        progress.update(len(layers) - len(todo))
        for count, (index, result) in enumerate(engine.map("sensitivity", todo), 1):
            probe = todo[index]
            errors[probe.layer].update(zip(probe.options, result, strict=True))
            progress.update()
            if count % 8 == 0 or count == len(todo):
                write_json(run.path(SENSITIVITY_FILE), {"version": VERSION, "noise_error": errors})
    return errors


def _left(row: Collection[str], outputs: Mapping[str, float | None], count: int | None) -> tuple[str, ...]:
    """Return what has still to be measured of a layer; what was measured for other options counts."""
    if count is not None and None not in outputs.values() and len([1 for label in outputs if label in row]) >= count:
        return ()
    return tuple(label for label in probed(outputs, count) if label not in row)


def _known_errors(run: Run) -> dict[str, dict[str, float]]:
    """Return what sensitivity.json holds; runs before 0.3 left lists, of the options that their space.json names."""
    if not run.path(SENSITIVITY_FILE).is_file():
        return {}
    rows = read_json(run.path(SENSITIVITY_FILE), version=VERSION)["noise_error"]
    if all(isinstance(row, dict) for row in rows.values()):
        return rows
    if not run.path("space.json").is_file():
        return {}  # nobody says which options they are of
    labels = SearchSpace.load(run.path("space.json")).labels
    return {name: dict(zip(labels, row, strict=True)) for name, row in rows.items()}
