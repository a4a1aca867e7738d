"""The first stages of a search: layers, bank, search space."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from quantdm.activations.calibration import calibrate
from quantdm.activations.moments import JointMoments
from quantdm.bank.weight_bank import WeightBank
from quantdm.errors import QuantDMError
from quantdm.files import read_json, write_json
from quantdm.pipelines.subject import Subject
from quantdm.progress import bar
from quantdm.quantizers import count_bits
from quantdm.quantizers.branches import fits_rank
from quantdm.runs.engines.local import Engine
from quantdm.runs.run import Run
from quantdm.runs.sensitivities import one_layer_errors
from quantdm.schemes import ORIGINAL
from quantdm.surrogates import SearchSpace
from quantdm.surrogates.transfer import values_by

RECORD_VERSION = 1
LEARNED_FILE, LEARNED_VERSION = "learned.json", 1


# ------------------------------------------------------------------------------------------------------ layers, bank


def describe(run: Run, subject: Subject) -> None:
    """Write layers.json (with embedding tables) and graph.json."""
    layers = [{**vars(layer), "shape": list(layer.shape)} for layer in subject.layers]
    tables = [{**vars(table), "shape": list(table.shape)} for table in subject.tables]
    write_json(run.path("layers.json"), {"version": RECORD_VERSION, "layers": layers, "tables": tables})
    write_json(run.path("graph.json"), subject.graph.to_dict())


def build_bank(run: Run, subject: Subject, *, batch_size: int | Literal["auto"] = "auto") -> WeightBank:
    """Write bank/: every layer under every option, and under the schemes that results are compared with.

    Calibrated options are calibrated on `batch_size` images at once at most.
    """
    bank = WeightBank(run.path("bank"), subject.layers, run.settings.bank_schemes, sweeps=run.settings.sweeps)
    names = {part: [layer.name for layer in layers] for part, layers in subject.part_layers.items()}
    moments = None
    if bank.calibrated:
        found = calibrate(
            subject.pipe, run.settings.calibration, names, folder=run.path("moments"), batch_size=batch_size
        )
        moments = JointMoments(found)
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
    errors = one_layer_errors(run, engine, layers)
    options = run.settings.schemes
    rows = [
        {
            option.label: (
                count_bits(layer.shape, option, layer.split),
                0.0 if option == ORIGINAL else bank.weight_error(layer.name, option),
                errors[layer.name][option.label],
            )
            for option in options
            if fits_rank(layer.shape, option)
        }
        for layer in layers
    ]
    bits, weight_error, noise_error = np.moveaxis(np.array([_filled(row, labels) for row in rows]), 2, 0)
    space = SearchSpace(layers, subject.graph, options, bits.astype(np.int64), weight_error, noise_error)
    if not path.is_file() or tuple(SearchSpace.load(path).labels) != labels:
        space.save(path)  # of two processes with one run the first counts: both go on with the same numbers
    return SearchSpace.load(path)


def _filled(row: Mapping[str, tuple[int, float, float]], labels: Sequence[str]) -> list[tuple[float, ...]]:
    """Return bits and errors of a layer under all options; one that it cannot have is worse than any other in all."""
    worst = [max(column) for column in zip(*row.values(), strict=True)]
    return [row.get(label, (2 * worst[0], worst[1], worst[2])) for label in labels]


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
