"""Why one configuration of a run is better than another: predicted by its surrogates, and measured where it was."""

from pathlib import Path
from typing import Any

import numpy as np

from quantdm.allocation.candidates import BASELINE
from quantdm.errors import QuantDMError, nearest
from quantdm.files import digest, read_json, write_json
from quantdm.recipe import load_recipe
from quantdm.runs.choose import verification_draws
from quantdm.runs.evaluator import job_of
from quantdm.runs.explain import is_current
from quantdm.runs.labels import weights_of
from quantdm.runs.run import Run
from quantdm.runs.stages import RECORD_VERSION
from quantdm.runs.store import TrialStore
from quantdm.runs.trials import label_draw, label_of
from quantdm.schemes import QuantConfig
from quantdm.surrogates import SearchSpace, explain_one

WHY_FILE = "why.json"


def choice_of(run: Run, space: SearchSpace, given: str | Path) -> np.ndarray:
    """Return a configuration [L] of a run's space from a recipe file, or from a scheme that every layer takes.

    Raises:
        QuantDMError: neither, or a recipe of another model, other layers or schemes that are no options of the run.
    """
    if str(given) in space.labels:
        return np.full(len(space.layers), space.labels.index(str(given)), dtype=np.int64)
    if not Path(given).is_file():
        raise QuantDMError(
            f"{given}: no recipe file, and no option of this run; give a *.yaml or a scheme, "
            f"{nearest(str(given), space.labels)}"
        )
    recipe = load_recipe(given)
    try:
        return space.choice_of(QuantConfig.from_labels(weights_of(run, recipe, space.layers)))
    except QuantDMError as error:
        raise QuantDMError(f"{given}: not a configuration of the run in {run.folder}: {error}") from None


def measured_difference(run: Run, space: SearchSpace, choice: np.ndarray, reference: np.ndarray) -> list[float]:
    """Return y(choice) - y(reference), y = -log(fid_fp), on every draw of noises on which the run measured both."""
    found = []
    stores = [TrialStore(run.path(name)) for name in ("trials", "verified")]
    pair = [space.config(row).to_labels() for row in (choice, reference)]
    for draw in (label_draw(run), *verification_draws(run)):
        records = [
            next((r for store in stores if (r := store.get(job_of(run, draw, labels).key)) is not None), None)
            for labels in pair
        ]
        own, other = records
        if own is not None and other is not None:
            found.append(label_of(own) - label_of(other))
    return found


def rival_of(configs: dict[str, dict[str, str | None]], chosen: str) -> str | None:
    """Return what a choice is held against: the one-layer sensitivities, else the first baseline that differs."""
    names = ["sensitivity", *(name for name in configs if name.startswith(BASELINE))]
    return next((name for name in names if name in configs and configs[name] != configs[chosen]), None)


def explain_choice(run: Run, space: SearchSpace, fitted: dict[str, Any]) -> None:
    """Write why.json: why the chosen candidate is better than its rival, by every surrogate; keep one of the same."""
    selection = read_json(run.path("selection.json"), version=RECORD_VERSION)
    rival = rival_of(selection["configs"], selection["chosen"])
    if rival is None:  # every other candidate is the same configuration
        run.path(WHY_FILE).unlink(missing_ok=True)
        return
    inputs = digest(selection["inputs"], selection["chosen"], rival)
    if is_current(run.path(WHY_FILE), inputs):
        return
    own, other = (
        space.choice_of(QuantConfig.from_labels(selection["configs"][name])) for name in (selection["chosen"], rival)
    )
    record = {
        "version": RECORD_VERSION,
        "inputs": inputs,
        "chosen": selection["chosen"],
        "against": rival,
        "measured": measured_difference(run, space, own, other),
        "explanations": {name: explain_one(surrogate, own, other).to_dict() for name, surrogate in fitted.items()},
    }
    write_json(run.path(WHY_FILE), record)
