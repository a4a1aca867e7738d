"""One-layer noise errors of a search: all at once from backward passes, one by one where these do not serve.

The noise error of an option is how far the denoiser's output is from full precision when this layer alone takes it.
"""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from quantdm.denoisers.inventory import LayerRecord
from quantdm.errors import counted
from quantdm.files import read_json, write_json
from quantdm.progress import Bar, bar
from quantdm.quantizers.branches import fits_rank
from quantdm.runs.claims import CLAIMS, Claims
from quantdm.runs.engines.call import Call
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import Probe
from quantdm.runs.jobs import Item, work_through
from quantdm.runs.propagated import Pass
from quantdm.runs.run import Run
from quantdm.runs.store import TrialStore
from quantdm.schemes import ORIGINAL
from quantdm.surrogates import SearchSpace

_log = logging.getLogger("quantdm")

VERSION = 1
SENSITIVITY_FILE, PASSES = "sensitivity.json", "passes"
AROUND = 4  # forward passes that a backward pass costs beside the products of the options: forward twice, and back
Errors = dict[str, dict[str, float]]  # layer -> label -> error


def one_layer_errors(run: Run, engine: Engine, layers: Sequence[LayerRecord]) -> Errors:
    """Return layer -> label -> one-layer noise error; what sensitivity.json has is not found out again."""
    errors = _known_errors(run)
    for layer in layers:
        errors.setdefault(layer.name, {}).update({ORIGINAL.label: 0.0} if ORIGINAL in run.settings.schemes else {})
    todo = _left(run, layers, errors)
    if todo and run.settings.noise_signs is not None:
        missing = {label for probe in todo for label in probe.options}
        options = tuple(label for label in run.settings.options if label in missing)
        found = _propagated(run, engine, options, len(todo))
        if found is not None:
            for name, row in errors.items():
                errors[name] = found.get(name, {}) | row
            _write(run, errors)
            todo = _left(run, layers, errors)
            if todo:
                _log.warning("%s not told by backward passes, first %s", counted(len(todo), "layer"), todo[0].layer)
    return _measured(run, engine, errors, todo, len(layers)) if todo else errors


def _left(run: Run, layers: Sequence[LayerRecord], errors: Mapping[str, Collection[str]]) -> list[Probe]:
    """Return what is not known of every layer that lacks something."""
    asked = {
        layer.name: [s.label for s in run.settings.schemes if s != ORIGINAL and fits_rank(layer.shape, s)]
        for layer in layers
    }
    left = {name: tuple(label for label in own if label not in errors[name]) for name, own in asked.items()}
    return [Probe(name, labels) for name, labels in left.items() if labels]


def needed_passes(draws: int, signs: int, *, layers: float, options: int) -> int | None:
    """Return how many backward passes of so many draws give all signs; None: measuring each layer takes no longer.

    So it is with few layers, or few images.

    Args:
        draws: of a pass, which runs every denoiser.
        layers: of a denoiser, on average.
    """
    needed = max(math.ceil(signs / draws), 1)
    return needed if needed * (AROUND + options) < layers * options else None


def _propagated(run: Run, engine: Engine, options: tuple[str, ...], layers: int) -> Errors | None:
    """Return the mean over as many backward passes as give `noise_signs` draws; None: they would take too long.

    The first one says how many draws a pass gives.
    """
    wanted, store = run.settings.noise_signs, TrialStore(run.path(PASSES))
    assert wanted is not None

    def needed(record: Mapping[str, Any]) -> int | None:
        each = layers / len(run.settings.seen.denoisers)
        return needed_passes(record["draws"], wanted, layers=each, options=len(options)) if record["draws"] else 1

    def items(first: int, last: int) -> dict[str, Item]:
        passes = [Pass(seed, options) for seed in range(first, last)]
        return {each.key: Item(Call("propagate", each), store) for each in passes}

    probe = Pass(0, options).key

    def follow(key: str, record: Mapping[str, Any], progress: Bar) -> Mapping[str, Item]:
        if key != probe:
            return {}
        progress.total = needed(record) or 1
        progress.refresh()
        return items(1, progress.total)

    with bar(1, "sensitivity: all layers") as progress:
        claims = Claims(run.path(PASSES) / CLAIMS)
        records = work_through(
            engine, items(0, 1), progress=progress, claims=claims, follow=lambda k, r: follow(k, r, progress)
        )
    if needed(records[probe]) is None:
        return None
    without = {part: reason for record in records.values() for part, reason in record["without"].items()}
    for part, reason in without.items():
        _log.warning("%s: has no backward pass here (%s); its layers are measured one by one", part, reason)
    return _mean([records[key]["errors"] for key in sorted(records)])


def _mean(found: Sequence[Errors]) -> Errors:
    """Return the mean of every error over the passes that tell it; what none tells is missing."""
    values: dict[str, dict[str, list[float]]] = {}
    for each in found:
        for name, own in each.items():
            for label, value in own.items():
                values.setdefault(name, {}).setdefault(label, []).append(value)
    return {
        name: {label: math.fsum(several) / len(several) for label, several in own.items()}
        for name, own in values.items()
    }


def _measured(run: Run, engine: Engine, errors: Errors, todo: Sequence[Probe], layers: int) -> Errors:
    with bar(layers, "sensitivity: layer by layer") as progress:
        progress.update(layers - len(todo))
        for count, (index, result) in enumerate(engine.map("sensitivity", todo), 1):
            probe = todo[index]
            errors[probe.layer].update(zip(probe.options, result, strict=True))
            progress.update()
            if count % 8 == 0 or count == len(todo):
                _write(run, errors)
    return errors


def _write(run: Run, errors: Errors) -> None:
    write_json(run.path(SENSITIVITY_FILE), {"version": VERSION, "noise_error": errors})


def _known_errors(run: Run) -> Errors:
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
