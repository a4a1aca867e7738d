"""Surrogates and their explanations as stages of a run."""

from typing import Any

import numpy as np

from quantdm.files import read_json, write_json
from quantdm.progress import bar
from quantdm.runs.run import Run
from quantdm.runs.stages import RECORD_VERSION
from quantdm.surrogates import (
    AdditiveSurrogate,
    Attribution,
    GraphSurrogate,
    RidgeSurrogate,
    SearchSpace,
    TreeSurrogate,
    attribute,
)
from quantdm.surrogates.ranking import spearman

SURROGATES = {"additive": AdditiveSurrogate, "tree": TreeSurrogate, "graph": GraphSurrogate}


# ------------------------------------------------------------------------------------------- surrogates, attribution


def fit_surrogates(run: Run, space: SearchSpace, choices: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Write surrogate.json: held-out rank quality of every surrogate; return the fitted ones that explain.

    Ridge regression is fitted as a yardstick only.
    """
    fitted: dict[str, Any] = {}
    with bar(len(SURROGATES) + 1, "surrogates: five folds each") as progress:
        for name, kind in {**SURROGATES, "ridge": RidgeSurrogate}.items():
            fitted[name] = kind(space, random_state=run.settings.seed).fit(choices, y)
            progress.update()
    null = {
        "average bits": spearman(space.avg_bits(choices), y),
        "sum of noise errors": spearman(-space.gather(space.noise_error, choices).sum(axis=1), y),
        "sum of weight errors": spearman(-space.gather(space.weight_error, choices).sum(axis=1), y),
    }
    record = {
        "version": RECORD_VERSION,
        "trials": len(y),
        "held_out_spearman": {name: [float(score) for score in s.cv_scores_] for name, s in fitted.items()},
        "held_out_ndcg": {name: [float(score) for score in s.cv_ndcg_] for name, s in fitted.items()},
        "without_learning": null,
    }
    write_json(run.path("surrogate.json"), record)
    return {name: surrogate for name, surrogate in fitted.items() if name in SURROGATES}


def explain(run: Run, fitted: dict[str, Any]) -> dict[str, Attribution]:
    """Write attribution.json: what every layer x option is worth to each surrogate."""
    found = {name: attribute(surrogate) for name, surrogate in fitted.items()}
    record = {"version": RECORD_VERSION, "attributions": {name: a.to_dict() for name, a in found.items()}}
    write_json(run.path("attribution.json"), record)
    return found


def load_attributions(run: Run) -> dict[str, Attribution]:
    """Read attribution.json."""
    record = read_json(run.path("attribution.json"), version=RECORD_VERSION)
    return {name: Attribution.from_dict(a) for name, a in record["attributions"].items()}
