"""Surrogates and their explanations as stages of a run."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quantdm.files import digest, read_json, write_json
from quantdm.progress import bar
from quantdm.runs.proposals import SURROGATES, weights_near
from quantdm.runs.run import Run
from quantdm.runs.stages import RECORD_VERSION
from quantdm.surrogates import Attribution, RidgeSurrogate, SearchSpace, attribute
from quantdm.surrogates.graph_surrogate import GRAPH_VERSION
from quantdm.surrogates.ranking import spearman

BY_BLOCKS = ("graph, whole blocks", "lambda mode")  # candidates that choose by what the graph surrogate says of blocks


def is_current(path: Path, inputs: str) -> bool:
    """Whether a stage's record is there and was made from inputs of that digest."""
    return path.is_file() and read_json(path, version=RECORD_VERSION).get("inputs") == inputs


# ------------------------------------------------------------------------------------------- surrogates, attribution


def fit_surrogates(run: Run, space: SearchSpace, choices: np.ndarray, y: np.ndarray, cheap: int = 0) -> dict[str, Any]:
    """Write surrogates/ and surrogate.json, held-out rank quality; return the fitted surrogates that explain.

    Those that were fitted to the same trials of the same space are opened again. Ridge regression is fitted as a
    yardstick only. The last `cheap` of the labels y [T] are no measured fid_fp; held-out figures hold for all of them.
    """
    arrays = (choices.tolist(), y.tolist(), space.noise_error.tolist(), space.weight_error.tolist())
    target = run.settings.target_bits
    inputs = digest(space.digest, space.graph.to_dict(), *arrays, run.settings.seed, GRAPH_VERSION, target)
    path = run.path("surrogate.json")
    files = {name: run.path("surrogates") / f"{name}.json" for name in SURROGATES}
    if is_current(path, inputs) and all(file.is_file() for file in files.values()):
        return {name: kind.load(files[name], space) for name, kind in SURROGATES.items()}
    path.unlink(missing_ok=True)  # from here on the files are not what it speaks of
    fitted: dict[str, Any] = {}
    weights = weights_near(space, choices, target)
    with bar(len(SURROGATES) + 1, "surrogates: five folds each") as progress:
        for name, kind in {**SURROGATES, "ridge": RidgeSurrogate}.items():
            fitted[name] = kind(space, random_state=run.settings.seed).fit(choices, y, weights)
            if name in files:
                fitted[name].save(files[name])
            progress.update()
    null = {
        "average bits": spearman(space.avg_bits(choices), y),
        "sum of noise errors": spearman(-space.gather(space.noise_error, choices).sum(axis=1), y),
        "sum of weight errors": spearman(-space.gather(space.weight_error, choices).sum(axis=1), y),
    }
    record = {
        "version": RECORD_VERSION,
        "inputs": inputs,
        "trials": len(y) - cheap,
        "cheap_labels": cheap,
        "held_out_spearman": {name: [float(score) for score in s.cv_scores_] for name, s in fitted.items()},
        "held_out_ndcg": {name: [float(score) for score in s.cv_ndcg_] for name, s in fitted.items()},
        "without_learning": null,
    }
    write_json(path, record)
    return {name: surrogate for name, surrogate in fitted.items() if name in SURROGATES}


def explain(run: Run, fitted: dict[str, Any]) -> dict[str, Attribution]:
    """Write attribution.json: what every layer x option is worth to each surrogate; keep it if it is of these."""
    inputs = read_json(run.path("surrogate.json"), version=RECORD_VERSION)["inputs"]
    if is_current(run.path("attribution.json"), inputs):
        return load_attributions(run)
    found = {name: attribute(surrogate) for name, surrogate in fitted.items()}
    attributions = {name: a.to_dict() for name, a in found.items()}
    write_json(
        run.path("attribution.json"), {"version": RECORD_VERSION, "inputs": inputs, "attributions": attributions}
    )
    return found


def leading(names: Collection[str], selection: Mapping[str, Any] | None, surrogate: Mapping[str, Any] | None) -> str:
    """Return which explanation of a run counts most.

    The one whose choice won the verification; where none of them did, the surrogate that ranks held-out trials best.

    Args:
        names: explanations to choose from.
        selection: content of the run's selection.json, if there is one.
        surrogate: content of its surrogate.json, if there is one.
    """
    chosen: str | None = (selection or {}).get("chosen")
    if chosen in BY_BLOCKS:
        chosen = "graph"
    if chosen is not None and chosen in names:
        return chosen
    folds = (surrogate or {}).get("held_out_spearman", {})
    return max(names, key=lambda name: float(np.mean(folds.get(name, [-1.0]))))


def leading_of(run: Run, names: Collection[str]) -> str:
    """Return which of some explanations counts most in a run (see `leading`)."""
    paths = [run.path("selection.json"), run.path("surrogate.json")]
    return leading(names, *(read_json(path, version=RECORD_VERSION) if path.is_file() else None for path in paths))


def load_attributions(run: Run) -> dict[str, Attribution]:
    """Read attribution.json."""
    record = read_json(run.path("attribution.json"), version=RECORD_VERSION)
    return {name: Attribution.from_dict(a) for name, a in record["attributions"].items()}
