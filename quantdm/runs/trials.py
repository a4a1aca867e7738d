"""Trials: which configurations are measured, and their labels."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from quantdm.allocation.pruning import fitting, prune
from quantdm.allocation.sampling import sample_configs, sample_frontier
from quantdm.errors import QuantDMError
from quantdm.files import digest, read_json, write_json
from quantdm.progress import bar
from quantdm.runs.cheap import EVERY, FOLDER, cheap_key, cheap_of
from quantdm.runs.claims import CLAIMS, Claims
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import job_of
from quantdm.runs.explain import is_current
from quantdm.runs.jobs import work_through
from quantdm.runs.labelled import label_draw, label_of
from quantdm.runs.plan import TrialPlan
from quantdm.runs.run import MIN_TRIALS, Run
from quantdm.runs.stages import RECORD_VERSION, learned_values
from quantdm.runs.store import TrialStore
from quantdm.schemes import ORIGINAL
from quantdm.surrogates import SearchSpace

# Shares of the trials: drawn over the whole space, near the frontier of the one-layer sensitivities, and near the
# frontier of what was learned so far. Trials pay most where the answer lies.
RANDOM_SHARE, FRONTIER_SHARE = 0.35, 0.3
NEAR = 0.75  # bits: how near the target a trial lies that tells of it
CUT_SHORT = "cut short"  # what stands for the inputs of a plan that time did not allow
LEAST = 20  # trials from which more are learned
PROPOSERS = ("additive", "tree")  # the network takes a minute to fit, these take seconds


# ----------------------------------------------------------------------------------------------------------- trials


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
    The plan is a function of the settings and of earlier labels by their place in the order (`rounds`), so an
    interrupted run, or one of many workers, ends as an undisturbed one of a single worker.
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
        values = learned_values(run, space)
        planned = first_trials(space, run.settings.trials, targets=targets, seed=seed, values=values)
        first = _distinct(np.concatenate([choices, planned]))[len(choices) :]
    earlier = cheap_verdict(run) if len(_cheap_labels(run, space, choices)[1]) else None
    asked = run.settings.trials if earlier is None else max(run.settings.trials // EVERY, MIN_TRIALS)
    wanted = len(choices) + max(_wanted(space, choices, asked, targets), len(first))
    with bar(wanted, f"trials: {label_draw(run).images} images each") as progress:
        progress.update(len(choices))
        plan = TrialPlan(run, space, targets, tuple(proposers), progress, wanted, most, earlier)
        plan.keep(choices, y)
        items = plan.first(first)
        claims = Claims(run.path("trials") / CLAIMS)
        work_through(engine, {**items, **plan.proposed()}, progress=progress, claims=claims, follow=plan.follow)
    if not (plan.is_cut_short and is_current(record, inputs)):  # another process may have had the time
        ended = CUT_SHORT if plan.is_cut_short else inputs
        write_json(record, {"version": RECORD_VERSION, "inputs": ended, **plan.record()})
    return plan.measured()


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


def load_labels(run: Run, space: SearchSpace) -> tuple[np.ndarray, np.ndarray, int]:
    """Return choices [T, L] and labels [T] that surrogates learn from, and how many of them are cheap ones.

    Full labels come first; cheap ones follow if they rank alike.
    """
    choices, y = load_trials(run, space)
    more, values = _cheap_labels(run, space, choices)
    return np.concatenate([choices, more]), np.concatenate([y, values]), len(values)


def _cheap_labels(run: Run, space: SearchSpace, choices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return choices and labels, by the line that was found, of configurations that have cheap ones only."""
    cheap, full = cheap_verdict(run), {row.tobytes() for row in choices}
    if cheap is None or not cheap["kept"]:
        return choices[:0], np.zeros(0)
    found = _own(run, space, FOLDER, lambda key: cheap_key(run, key))
    rows, (slope, offset) = space.choices_of([record["config"] for record in found]), cheap["line"]
    new = np.array([row.tobytes() not in full for row in rows], dtype=bool)
    return rows[new], np.array([slope * cheap_of(record) + offset for record in found])[new]


def cheap_verdict(run: Run) -> dict[str, Any] | None:
    """Return what was found of the cheap labels of a run's trials; None where it has none."""
    path = run.path("trials.json")
    return read_json(path, version=RECORD_VERSION).get("cheap") if path.is_file() else None


def own_trials(run: Run, space: SearchSpace) -> list[dict[str, Any]]:
    """Return the finished trials that count: of the run's noises, with schemes that are options.

    A run that had other options, or labels of other images, may hold more.
    """
    return _own(run, space, "trials", lambda key: key)


def _own(run: Run, space: SearchSpace, folder: str, key_of: Callable[[str], str]) -> list[dict[str, Any]]:
    """Return the records of a store that count: `key_of` a trial's key is what its record there has."""
    draw = label_draw(run)
    return [
        record
        for record in TrialStore(run.path(folder))
        if space.holds(record["config"]) and record["key"] == key_of(job_of(run, draw, record["config"]).key)
    ]


def _arrays(space: SearchSpace, trials: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    choices = space.choices_of([trial["config"] for trial in trials])
    return choices, np.array([label_of(trial) for trial in trials], dtype=np.float64)


def _distinct(choices: np.ndarray) -> np.ndarray:
    _, index = np.unique(choices, axis=0, return_index=True)
    return choices[np.sort(index)]
