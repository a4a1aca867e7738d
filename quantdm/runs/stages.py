"""The first stages of a search: layers, bank, search space."""

import numpy as np

from quantdm.activations.calibration import calibrate
from quantdm.activations.moments import JointMoments
from quantdm.errors import QuantDMError
from quantdm.files import read_json, write_json
from quantdm.pipelines.subject import Subject
from quantdm.progress import bar
from quantdm.quantizers import count_bits
from quantdm.runs.bank import WeightBank
from quantdm.runs.engines.local import Engine
from quantdm.runs.run import Run
from quantdm.surrogates import SearchSpace

RECORD_VERSION = 1
SENSITIVITY_FILE = "sensitivity.json"


# ------------------------------------------------------------------------------------------------------ layers, bank


def describe(run: Run, subject: Subject) -> None:
    """Write layers.json and graph.json."""
    layers = [{**vars(layer), "shape": list(layer.shape)} for layer in subject.layers]
    write_json(run.path("layers.json"), {"version": RECORD_VERSION, "layers": layers})
    write_json(run.path("graph.json"), subject.graph.to_dict())


def build_bank(run: Run, subject: Subject) -> WeightBank:
    """Write bank/: every layer under every option, and under the schemes that results are compared with."""
    bank = WeightBank(run.path("bank"), subject.layers, run.settings.bank_schemes, sweeps=run.settings.sweeps)
    names = {part: [layer.name for layer in layers] for part, layers in subject.part_layers.items()}
    moments = None
    if bank.calibrated:
        moments = JointMoments(calibrate(subject.pipe, run.settings.calibration, names, folder=run.path("moments")))
    with bar(sum(layer.num_weights for layer in subject.layers), "bank: weights x options") as progress:
        return bank.build(subject.weights, moments=moments, progress=progress.update)


# ----------------------------------------------------------------------------------------------------- search space


def measure_space(run: Run, engine: Engine, subject: Subject, bank: WeightBank) -> SearchSpace:
    """Write sensitivity.json (one-layer noise errors) and space.json (bits and errors of every layer x option)."""
    path = run.path("space.json")
    if path.is_file():
        return SearchSpace.load(path)
    layers = subject.layers
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
        graph=subject.graph,
        options=options,
        bits=np.array([[count_bits(la.shape, scheme, la.split) for scheme in options] for la in layers]),
        weight_error=np.array([[bank.weight_error(la.name, scheme) for scheme in options] for la in layers]),
        noise_error=np.array([errors[la.name] for la in layers]),
    )
    if not path.is_file():  # of two processes with one run the first counts: both go on with the same numbers
        space.save(path)
    return SearchSpace.load(path)


def load_space(run: Run) -> SearchSpace:
    """Read space.json.

    Raises:
        QuantDMError: the stage has not run yet.
    """
    if not run.path("space.json").is_file():
        raise QuantDMError(f"no search space in {run.folder}; run `quantdm search --run-dir {run.folder}` first")
    return SearchSpace.load(run.path("space.json"))
