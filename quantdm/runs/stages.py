"""The first stages of a search: layers, bank, search space."""

import numpy as np
from torch import nn

from quantdm.activations.moments import gather_moments
from quantdm.denoisers.analysis import trace_graph
from quantdm.denoisers.graph import Graph
from quantdm.denoisers.inventory import LayerRecord, list_layers
from quantdm.errors import QuantDMError
from quantdm.files import read_json, write_json
from quantdm.pipelines.generate import calibration_calls
from quantdm.pipelines.loading import DiffusionPipeline
from quantdm.pipelines.parts import get_denoiser
from quantdm.progress import bar
from quantdm.quantizers import count_bits
from quantdm.runs.bank import WeightBank
from quantdm.runs.engines.local import Engine
from quantdm.runs.run import Run
from quantdm.surrogates import (
    SearchSpace,
)

RECORD_VERSION = 1
SENSITIVITY_FILE = "sensitivity.json"
# Images whose trajectories calibrate, and their base seed: outside those of every draw.
CALIBRATION_IMAGES, CALIBRATION_SEED = 16, 900


# ------------------------------------------------------------------------------------------------------ layers, bank


def describe(run: Run, denoiser: nn.Module) -> tuple[tuple[LayerRecord, ...], Graph]:
    """Write layers.json and graph.json."""
    layers, graph = list_layers(denoiser), trace_graph(denoiser)
    write_json(
        run.path("layers.json"),
        {"version": RECORD_VERSION, "layers": [{**vars(layer), "shape": list(layer.shape)} for layer in layers]},
    )
    write_json(run.path("graph.json"), graph.to_dict())
    return layers, graph


def build_bank(run: Run, pipe: DiffusionPipeline) -> WeightBank:
    """Write bank/: every layer under every option; calibrated options see the inputs of CALIBRATION_IMAGES images."""
    denoiser = get_denoiser(pipe)
    layers, settings = list_layers(denoiser), run.settings
    bank = WeightBank(run.path("bank"), layers, settings.schemes)
    moments = None
    if bank.calibrated:
        first = (settings.seed * 1000 + CALIBRATION_SEED) * 10**6
        seeds = range(first, first + CALIBRATION_IMAGES)
        calls = calibration_calls(pipe, settings.protocol, seeds, steps=settings.label_steps)
        moments = gather_moments(denoiser, calls, [layer.name for layer in layers], folder=run.path("moments"))
    with bar(sum(layer.num_weights for layer in layers), "bank: weights x options") as progress:
        return bank.build(denoiser, moments=moments, progress=progress.update)


# ----------------------------------------------------------------------------------------------------- search space


def measure_space(run: Run, engine: Engine, denoiser: nn.Module, bank: WeightBank) -> SearchSpace:
    """Write sensitivity.json (one-layer noise errors) and space.json (bits and errors of every layer x option)."""
    path = run.path("space.json")
    if path.is_file():
        return SearchSpace.load(path)
    layers, graph = list_layers(denoiser), trace_graph(denoiser)
    measured = run.path(SENSITIVITY_FILE)
    errors: dict[str, list[float]] = {}
    if measured.is_file():
        errors = read_json(measured, version=RECORD_VERSION)["noise_error"]
    todo = [layer.name for layer in layers if layer.name not in errors]
    with bar(len(layers), "sensitivity: one layer a time") as progress:
        progress.update(len(layers) - len(todo))
        for index, result in engine.map("sensitivity", todo):
            errors[todo[index]] = result
            progress.update()
            if len(errors) % 8 == 0 or len(errors) == len(layers):
                write_json(measured, {"version": RECORD_VERSION, "noise_error": errors})
    options = run.settings.schemes
    space = SearchSpace(
        layers=layers,
        graph=graph,
        options=options,
        bits=np.array([[count_bits(la.shape, scheme, la.split) for scheme in options] for la in layers]),
        weight_error=np.array([[bank.weight_error(la.name, scheme) for scheme in options] for la in layers]),
        noise_error=np.array([errors[la.name] for la in layers]),
    )
    space.save(path)
    return space


def load_space(run: Run) -> SearchSpace:
    """Read space.json.

    Raises:
        QuantDMError: the stage has not run yet.
    """
    if not run.path("space.json").is_file():
        raise QuantDMError(f"no search space in {run.folder}; run `quantdm search --run-dir {run.folder}` first")
    return SearchSpace.load(run.path("space.json"))
