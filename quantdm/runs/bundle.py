"""Trials in one file: carried to another machine, joined with those that were measured there."""

from pathlib import Path
from typing import Any

from quantdm.errors import QuantDMError
from quantdm.files import check_output, read_json, write_json
from quantdm.runs.evaluator import job_of
from quantdm.runs.run import Run
from quantdm.runs.store import TrialStore
from quantdm.runs.trials import label_draw

BUNDLE_VERSION = 1
_LABELS = ("seen", "protocol", "dtype", "label_images", "label_steps", "seed", "options")  # what determines a label
_CALIBRATION = ("calibration_images", "calibration_steps", "sweeps", "embeddings")  # and the weights measured


def export_trials(run: Run, path: str | Path) -> int:
    """Write all finished trials of a run as one JSON file; return how many.

    Raises:
        QuantDMError: the run has none, or the file cannot be written.
    """
    check_output(path)
    trials = [{k: v for k, v in trial.items() if k not in ("version", "key")} for trial in _store(run)]
    if not trials:
        raise QuantDMError(f"{run.folder}: has no finished trials yet; nothing to export")
    write_json(path, {"version": BUNDLE_VERSION, "kind": "trials", "of": _of(run), "trials": trials})
    return len(trials)


def import_trials(run: Run, path: str | Path) -> int:
    """Add the trials of a file to a run; return how many were new.

    Raises:
        QuantDMError: no such file, or trials of another pipeline, protocol, seed, precision or other options; the
            first difference is named. Nothing is added then.
    """
    record = read_json(path, version=BUNDLE_VERSION)
    if record.get("kind") != "trials" or not isinstance(record.get("trials"), list):
        raise QuantDMError(f"{path}: holds no trials; expected a file of `quantdm trials export`")
    own = _of(run)
    other = next((key for key in own if record.get("of", {}).get(key) != own[key]), None)
    if other is not None:
        raise QuantDMError(
            f"{path}: its trials are of another {other.replace('_', ' ')} than the run {run.folder}; labels are "
            "comparable only where all that determines them is equal"
        )
    store, draw, added = _store(run), label_draw(run), 0
    for trial in record["trials"]:
        key = job_of(run, draw, _config(trial, path)).key
        if store.get(key) is None:
            store.put(key, trial)
            added += 1
    return added


def _config(trial: Any, path: str | Path) -> dict[str, str | None]:
    if not isinstance(trial, dict) or not isinstance(trial.get("config"), dict) or "fid_fp" not in trial:
        raise QuantDMError(f"{path}: holds a trial without configuration or fid_fp; export it again")
    return trial["config"]


def _store(run: Run) -> TrialStore:
    return TrialStore(run.path("trials"))


def _of(run: Run) -> dict[str, Any]:
    settings = run.settings.model_dump(mode="json")
    return {key: settings.get(key) for key in (*_LABELS, *_CALIBRATION)}
