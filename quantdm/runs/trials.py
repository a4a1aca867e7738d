"""Trials: which configurations are measured, and their labels."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from quantdm.allocation.pruning import fitting, prune
from quantdm.allocation.sampling import sample_configs, sample_frontier
from quantdm.errors import QuantDMError
from quantdm.files import digest, read_json, write_json
from quantdm.metrics.samples import Draw
from quantdm.progress import bar
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import job_of
from quantdm.runs.explain import SURROGATES, is_current
from quantdm.runs.jobs import measure_jobs
from quantdm.runs.proposals import propose
from quantdm.runs.run import MIN_TRIALS, Run
from quantdm.runs.stages import RECORD_VERSION, learned_values
from quantdm.runs.store import TrialStore
from quantdm.schemes import ORIGINAL
from quantdm.surrogates import (
    SearchSpace,
)

# Shares of the trials: drawn over the whole space, near the frontier of the one-layer sensitivities, and near the
# frontier of what was learned so far. Trials pay most where the answer lies.
RANDOM_SHARE, FRONTIER_SHARE = 0.35, 0.3
NEAR = 0.75  # bits: how near the target a trial lies that tells of it
CUT_SHORT = "cut short"  # what stands for the inputs of a plan that time did not allow
LEAST = 20  # trials from which more are learned
BATCH = 70  # learned trials that are chosen at once
PROPOSERS = ("additive", "tree")  # the network takes a minute to fit, these take seconds


# ----------------------------------------------------------------------------------------------------------- trials


def label_draw(run: Run) -> Draw:
    """Return the noises of the search's labels."""
    return Draw(run.settings.seed * 1000, run.settings.label_images, run.settings.label_steps)


def run_trials(
    run: Run,
    engine: Engine,
    space: SearchSpace,
    *,
    targets: Sequence[float] = (),
    proposers: Sequence[str] = PROPOSERS,
    most: Callable[[int], int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Write trials/ and trials.json (which they are): every planned configuration measured, if it was not yet.

    Returns choices [T, L] and y = -log(fid_fp) [T].
    The plan is a function of the settings and of earlier labels only, so an interrupted run ends as an undisturbed one.
    `targets` are the sizes whose frontier is explored (default: the run's), `proposers` the surrogates that choose the
    learned batches. `most` says how many trials time allows when some are done; a run that it cut short goes on where
    it stopped when it is asked for all.
    """
    seed, targets = run.settings.seed, tuple(targets or (run.settings.target_bits,))
    record, errors = run.path("trials.json"), (space.noise_error.tolist(), space.weight_error.tolist())
    inputs = digest(run.settings.model_dump(mode="json"), space.digest, *errors, list(targets), list(proposers))
    if is_current(record, inputs) and (done := _planned(run, space, read_json(record)["keys"])) is not None:
        return done
    choices, y = _earlier(run, space)
    first = choices[:0]
    if not _covers(space, choices):
        plan = first_trials(space, run.settings.trials, targets=targets, seed=seed, values=learned_values(run, space))
        first = _distinct(np.concatenate([choices, plan]))[len(choices) :]
    kept = len(choices)
    wanted = kept + max(_wanted(space, choices, run.settings.trials, targets), len(first))
    free = kept + _already(run, space, first)  # what lies there takes no time
    total = _allowed(most, wanted, free, 0)
    with bar(total, f"trials: {label_draw(run).images} images each") as progress:
        progress.update(kept)
        y = np.concatenate([y, label_trials(run, engine, space, first[: total - kept], progress)])
        choices = np.concatenate([choices, first[: total - kept]])
        total = progress.total = _allowed(most, wanted, free, max(len(choices) - free, 0))
        batches = max(1, round((total - len(choices)) / BATCH))
        for batch in range(batches):
            count = (total - len(choices)) // (batches - batch)
            if count < 1:
                continue
            learned = [SURROGATES[name](space, random_state=seed).fit(choices, y) for name in proposers]
            fresh = propose(space, learned, count, targets=targets, tried=choices, seed=seed + 1 + 1000 * batch)
            y = np.concatenate([y, label_trials(run, engine, space, fresh, progress)])
            choices = np.concatenate([choices, fresh])
    keys = _keys(run, space, choices)
    write_json(record, {"version": RECORD_VERSION, "inputs": inputs if total == wanted else CUT_SHORT, "keys": keys})
    return choices, y


def _already(run: Run, space: SearchSpace, choices: np.ndarray) -> int:
    store = TrialStore(run.path("trials"))
    return sum(store.get(key) is not None for key in _keys(run, space, choices))


def _keys(run: Run, space: SearchSpace, choices: np.ndarray) -> list[str]:
    return [job_of(run, label_draw(run), space.config(choice).to_labels()).key for choice in choices]


def _allowed(most: Callable[[int], int] | None, total: int, free: int, done: int) -> int:
    """Return how many trials there will be: `total`, or what time allows, but enough to learn from.

    Args:
        most: says how many measurements fit, of which some are done.
        total: of the plan.
        free: trials that were there before.
        done: measured since then.
    """
    return total if most is None else min(total, max(free + done, free + most(done), MIN_TRIALS))


def _earlier(run: Run, space: SearchSpace) -> tuple[np.ndarray, np.ndarray]:
    """Return the trials of the plan that was finished last, of a smaller run or another target, as far as they count.

    Not those that lie there beyond it: a run that was interrupted goes on with the plan that it had.
    """
    record, store = run.path("trials.json"), TrialStore(run.path("trials"))
    keys = read_json(record, version=RECORD_VERSION)["keys"] if record.is_file() else []
    if any(store.get(key) is None for key in keys):  # it is not finished any more
        keys = []
    found = {trial["key"]: trial for trial in own_trials(run, space)}
    return _arrays(space, [found[key] for key in keys if key in found])


def _covers(space: SearchSpace, choices: np.ndarray) -> bool:
    """Tell whether trials are enough to learn from, and every option occurs in them."""
    return len(choices) >= LEAST and set(choices.ravel().tolist()) >= set(_quantized(space))


def _wanted(space: SearchSpace, choices: np.ndarray, total: int, targets: Sequence[float]) -> int:
    """Return how many trials are to be added to those that are there.

    As many as are asked for in all, and near the targets as many as a run has that starts with them.
    """
    if not len(choices):
        return total
    apart = np.abs(space.avg_bits(choices)[:, None] - np.array(targets)).min(axis=1)
    lacking = round(total * (1 - RANDOM_SHARE)) - int((apart <= NEAR).sum())
    return max(total - len(choices), lacking if lacking > total // 10 else 0, 0)


def _planned(run: Run, space: SearchSpace, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the choices and labels of finished trials by their keys, or None if one of them is gone."""
    trials = [TrialStore(run.path("trials")).get(key) for key in keys]
    found = [trial for trial in trials if trial is not None]
    return _arrays(space, found) if len(found) == len(keys) else None


def first_trials(
    space: SearchSpace, total: int, *, targets: Sequence[float], seed: int, values: np.ndarray | None = None
) -> np.ndarray:
    """Return the choices [T, L] that need no labels: every option alone, random mixes, those near a frontier.

    The frontier is that of `values` [L, O], of one-layer noise errors if there are none.
    """
    values = -space.noise_error if values is None else values
    anchors = np.tile(np.array(_quantized(space))[:, None], (1, len(space.layers)))
    anchors = np.where(space.gather(fitting(space), anchors), anchors, prune(space, anchors))
    mixes = sample_configs(space, max(1, round(total * RANDOM_SHARE) - len(anchors)), seed=seed)
    plan = [anchors, prune(space, mixes)]
    each = max(1, round(total * FRONTIER_SHARE / len(targets)))
    for index, target in enumerate(targets):
        frontier = sample_frontier(space, values, each, target_bits=target, seed=seed + index, allow_fewer=True)
        plan.append(prune(space, frontier))
    return _distinct(np.concatenate(plan))[:total]


def _quantized(space: SearchSpace) -> list[int]:
    """Return the options that quantize: a trial of the others everywhere is the reference itself."""
    return [index for index, option in enumerate(space.options) if option != ORIGINAL]


def load_trials(run: Run, space: SearchSpace) -> tuple[np.ndarray, np.ndarray]:
    """Return the choices [T, L] and labels y = -log(fid_fp) [T] of all finished trials of a run."""
    trials = own_trials(run, space)
    if not trials:
        raise QuantDMError(f"no trials in {run.path('trials')}; run `quantdm search --run-dir {run.folder}` first")
    return _arrays(space, trials)


def own_trials(run: Run, space: SearchSpace) -> list[dict[str, Any]]:
    """Return the finished trials that count: of the run's noises, with schemes that are options.

    A run that had other options, or labels of other images, may hold more.
    """
    draw, names, labels = label_draw(run), set(space.layer_names), space.places.keys()
    return [
        trial
        for trial in TrialStore(run.path("trials"))
        if trial["config"].keys() == names
        and labels >= set(trial["config"].values())
        and trial["key"] == job_of(run, draw, trial["config"]).key
    ]


def _arrays(space: SearchSpace, trials: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    rows = [[space.places[trial["config"][name]] for name in space.layer_names] for trial in trials]
    choices = np.array(rows, dtype=np.int64).reshape(-1, len(space.layers))
    return choices, np.array([label_of(trial) for trial in trials], dtype=np.float64)


def label_of(trial: dict[str, Any]) -> float:
    """Return y = -log(fid_fp) of a trial: larger is better, and equal ratios count equally."""
    return -float(np.log(max(trial["fid_fp"], 1e-9)))


def label_trials(run: Run, engine: Engine, space: SearchSpace, choices: np.ndarray, progress: Any) -> np.ndarray:
    """Measure choices [T, L] that have no trial yet and return the labels y [T] of all of them."""
    store = TrialStore(run.path("trials"))
    draw = label_draw(run)
    labels = [space.config(choice).to_labels() for choice in choices]
    jobs = [job_of(run, draw, config) for config in labels]
    avg_bits = {job.key: float(bits) for job, bits in zip(jobs, space.avg_bits(choices), strict=True)}

    def record_of(key: str, figures: dict[str, Any]) -> dict[str, Any]:
        return {"config": distinct[key].labels, "avg_bits": avg_bits[key], **figures}

    distinct = {job.key: job for job in jobs}
    found = measure_jobs(engine, store, distinct, progress=progress, record_of=record_of)
    return np.array([label_of(found[job.key]) for job in jobs])


def _distinct(choices: np.ndarray) -> np.ndarray:
    _, index = np.unique(choices, axis=0, return_index=True)
    return choices[np.sort(index)]
