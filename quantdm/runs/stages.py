"""The first stages of a search: layers, bank, search space."""

from collections.abc import Sequence

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
from quantdm.runs.evaluator import Probe
from quantdm.runs.run import Run
from quantdm.surrogates import SearchSpace
from quantdm.surrogates.transfer import values_by

RECORD_VERSION = 1
SENSITIVITY_FILE = "sensitivity.json"
LEARNED_FILE, LEARNED_VERSION = "learned.json", 1


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
    labels = run.settings.options
    if path.is_file() and tuple((known := SearchSpace.load(path)).labels) == labels:
        return known
    layers = subject.layers
    errors = _one_layer_errors(run, engine, [layer.name for layer in layers])
    options = run.settings.schemes
    space = SearchSpace(
        layers=layers,
        graph=subject.graph,
        options=options,
        bits=np.array([[count_bits(la.shape, scheme, la.split) for scheme in options] for la in layers]),
        weight_error=np.array([[bank.weight_error(la.name, scheme) for scheme in options] for la in layers]),
        noise_error=np.array([[errors[la.name][label] for label in labels] for la in layers]),
    )
    if not path.is_file() or tuple(SearchSpace.load(path).labels) != labels:
        space.save(path)  # of two processes with one run the first counts: both go on with the same numbers
    return SearchSpace.load(path)


def _one_layer_errors(run: Run, engine: Engine, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return layer -> label -> one-layer noise error; what sensitivity.json has is not measured again."""
    measured, labels = run.path(SENSITIVITY_FILE), run.settings.options
    errors = _known_errors(run)
    missing = {name: tuple(label for label in labels if label not in errors.get(name, {})) for name in names}
    todo = [Probe(name, left) for name, left in missing.items() if left]
    with bar(len(names), "sensitivity: one layer a time") as progress:
        progress.update(len(names) - len(todo))
        for count, (index, result) in enumerate(engine.map("sensitivity", todo), 1):
            probe = todo[index]
            errors.setdefault(probe.layer, {}).update(zip(probe.options, result, strict=True))
            progress.update()
            if count % 8 == 0 or count == len(todo):
                write_json(measured, {"version": RECORD_VERSION, "noise_error": errors})
    return errors


def _known_errors(run: Run) -> dict[str, dict[str, float]]:
    """Return what sensitivity.json holds; runs before 0.3 left lists, of the options that their space.json names."""
    if not run.path(SENSITIVITY_FILE).is_file():
        return {}
    rows = read_json(run.path(SENSITIVITY_FILE), version=RECORD_VERSION)["noise_error"]
    if all(isinstance(row, dict) for row in rows.values()):
        return rows
    if not run.path("space.json").is_file():
        return {}  # nobody says which options they are of
    labels = load_space(run).labels
    return {name: dict(zip(labels, row, strict=True)) for name, row in rows.items()}


def load_space(run: Run) -> SearchSpace:
    """Read space.json.

    Raises:
        QuantDMError: the stage has not run yet.
    """
    if not run.path("space.json").is_file():
        raise QuantDMError(f"no search space in {run.folder}; run `quantdm search --run-dir {run.folder}` first")
    return SearchSpace.load(run.path("space.json"))


def learned_values(run: Run, space: SearchSpace) -> np.ndarray | None:
    """Return what options are worth by what other runs taught this one [L, O]; None if none did."""
    if run.settings.learned is None:
        return None
    record = read_json(run.path(LEARNED_FILE), version=LEARNED_VERSION)
    if record["digest"] != run.settings.learned:
        raise QuantDMError(f"{run.path(LEARNED_FILE)}: not what this run learned from others; start it anew")
    return values_by(space, record["effects"])
