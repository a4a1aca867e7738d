"""The stages of a search, each `inputs -> one record -> one file`; a stage whose record exists is not run again."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from quantdm.denoisers.graph import Graph, trace_graph
from quantdm.denoisers.layers import LayerRecord, list_layers
from quantdm.denoisers.pipeline import DiffusionPipeline, get_denoiser
from quantdm.errors import QuantDMError
from quantdm.files import read_json, write_json
from quantdm.progress import bar
from quantdm.quantizers import count_bits
from quantdm.search.bank import WeightBank
from quantdm.search.calibration import calibration_calls, gather_moments
from quantdm.search.engine import Engine
from quantdm.search.evaluation import Draw
from quantdm.search.evaluator import Job
from quantdm.search.proposals import propose
from quantdm.search.run import Run
from quantdm.search.sampling import sample_configs, sample_frontier
from quantdm.search.store import TrialStore
from quantdm.surrogates import (
    AdditiveSurrogate,
    Attribution,
    GraphSurrogate,
    RidgeSurrogate,
    SearchSpace,
    TreeSurrogate,
    attribute,
)
from quantdm.surrogates.space import spearman

RECORD_VERSION = 1
SENSITIVITY_FILE = "sensitivity.json"
SURROGATES = {"additive": AdditiveSurrogate, "tree": TreeSurrogate, "graph": GraphSurrogate}
# Shares of the trials: drawn over the whole space, near the frontier of the one-layer sensitivities, and near the
# frontier of what was learned so far. Trials pay most where the answer lies.
RANDOM_SHARE, FRONTIER_SHARE = 0.35, 0.3
# Images whose trajectories calibrate, and their base seed: outside those of every draw.
CALIBRATION_IMAGES, CALIBRATION_SEED = 16, 900
BATCH = 70  # learned trials that are chosen at once
PROPOSERS = ("additive", "tree")  # the network takes a minute to fit, these take seconds


# ------------------------------------------------------------------------------------------------------ layers, bank


def describe(run: Run, denoiser: nn.Module) -> tuple[tuple[LayerRecord, ...], Graph]:
    """Write layers.json and graph.json."""
    layers, graph = list_layers(denoiser), trace_graph(denoiser)
    write_json(
        run.path("layers.json"),
        {"version": RECORD_VERSION, "layers": [{**vars(layer), "shape": list(layer.shape)} for layer in layers]},
    )
    write_json(run.path("graph.json"), graph.to_dict())
    return layers, graph


def build_bank(run: Run, pipe: DiffusionPipeline) -> WeightBank:
    """Write bank/: every layer under every option; calibrated options see the inputs of CALIBRATION_IMAGES images."""
    denoiser = get_denoiser(pipe)
    layers, settings = list_layers(denoiser), run.settings
    bank = WeightBank(run.path("bank"), layers, settings.schemes)
    moments = None
    if bank.calibrated:
        first = (settings.seed * 1000 + CALIBRATION_SEED) * 10**6
        seeds = range(first, first + CALIBRATION_IMAGES)
        calls = calibration_calls(pipe, settings.protocol, seeds, steps=settings.label_steps)
        moments = gather_moments(denoiser, calls, [layer.name for layer in layers], folder=run.path("moments"))
    with bar(sum(layer.num_weights for layer in layers), "bank: weights x options") as progress:
        return bank.build(denoiser, moments=moments, progress=progress.update)


# ----------------------------------------------------------------------------------------------------- search space


def measure_space(run: Run, engine: Engine, denoiser: nn.Module, bank: WeightBank) -> SearchSpace:
    """Write sensitivity.json (one-layer noise errors) and space.json (bits and errors of every layer x option)."""
    path = run.path("space.json")
    if path.is_file():
        return SearchSpace.load(path)
    layers, graph = list_layers(denoiser), trace_graph(denoiser)
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
        graph=graph,
        options=options,
        bits=np.array([[count_bits(la.shape, scheme, la.split) for scheme in options] for la in layers]),
        weight_error=np.array([[bank.weight_error(la.name, scheme) for scheme in options] for la in layers]),
        noise_error=np.array([errors[la.name] for la in layers]),
    )
    space.save(path)
    return space


def load_space(run: Run) -> SearchSpace:
    """Read space.json.

    Raises:
        QuantDMError: the stage has not run yet.
    """
    if not run.path("space.json").is_file():
        raise QuantDMError(f"no search space in {run.folder}; run `quantdm search --run-dir {run.folder}` first")
    return SearchSpace.load(run.path("space.json"))


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
) -> tuple[np.ndarray, np.ndarray]:
    """Write trials/: every planned configuration measured; return choices [T, L] and y = -log(fid_fp) [T].

    The plan is a function of the settings and of earlier labels only, so an interrupted run ends as an undisturbed one.
    `targets` are the sizes whose frontier is explored (default: the run's), `proposers` the surrogates that choose the
    learned batches.
    """
    total, seed = run.settings.trials, run.settings.seed
    targets = targets or (run.settings.target_bits,)
    choices = first_trials(space, total, targets=targets, seed=seed)
    batches = max(1, round((total - len(choices)) / BATCH))
    with bar(total, f"trials: {label_draw(run).images} images each") as progress:
        y = label_trials(run, engine, space, choices, progress)
        for batch in range(batches):
            count = (total - len(choices)) // (batches - batch)
            if count < 1:
                continue
            learned = [SURROGATES[name](space, random_state=seed).fit(choices, y) for name in proposers]
            fresh = propose(space, learned, count, targets=targets, tried=choices, seed=seed + 1 + 1000 * batch)
            y = np.concatenate([y, label_trials(run, engine, space, fresh, progress)])
            choices = np.concatenate([choices, fresh])
    return choices, y


def first_trials(space: SearchSpace, total: int, *, targets: Sequence[float], seed: int) -> np.ndarray:
    """Return the choices [T, L] that need no labels: every option alone, random mixes, the sensitivities' frontier."""
    anchors = np.tile(np.arange(len(space.options))[:, None], (1, len(space.layers)))
    plan = [anchors, sample_configs(space, max(1, round(total * RANDOM_SHARE) - len(anchors)), seed=seed)]
    each = max(1, round(total * FRONTIER_SHARE / len(targets)))
    for index, target in enumerate(targets):
        plan.append(sample_frontier(space, -space.noise_error, each, target_bits=target, seed=seed + index))
    return _distinct(np.concatenate(plan))[:total]


def load_trials(run: Run, space: SearchSpace) -> tuple[np.ndarray, np.ndarray]:
    """Return the choices [T, L] and labels y = -log(fid_fp) [T] of all finished trials of a run."""
    trials = list(TrialStore(run.path("trials")))
    if not trials:
        raise QuantDMError(f"no trials in {run.path('trials')}; run `quantdm search --run-dir {run.folder}` first")
    rows = [[space.labels.index(trial["config"][name]) for name in space.layer_names] for trial in trials]
    return np.array(rows), np.array([label_of(trial) for trial in trials])


def label_of(trial: dict[str, Any]) -> float:
    """Return y = -log(fid_fp) of a trial: larger is better, and equal ratios count equally."""
    return -float(np.log(max(trial["fid_fp"], 1e-9)))


def label_trials(run: Run, engine: Engine, space: SearchSpace, choices: np.ndarray, progress: Any) -> np.ndarray:
    """Measure choices [T, L] that have no trial yet and return the labels y [T] of all of them."""
    store = TrialStore(run.path("trials"))
    configs = [space.config(choice).to_labels() for choice in choices]
    jobs = [Job(label_draw(run), labels) for labels in configs]
    records: dict[int, dict[str, Any]] = {}
    for index, job in enumerate(jobs):
        record = store.get(job.key)
        if record is not None:
            records[index] = record
    progress.update(len(records))
    todo = [index for index in range(len(jobs)) if index not in records]
    if todo:
        engine.local.reference(label_draw(run))  # once, before the workers want it
    for position, result in engine.map("measure", [jobs[index] for index in todo]):
        index = todo[position]
        records[index] = {
            "config": configs[index],
            "avg_bits": float(space.avg_bits(choices[index])[0]),
            **result,
        }
        store.put(jobs[index].key, records[index])
        progress.update()
    return np.array([label_of(records[index]) for index in range(len(jobs))])


def _distinct(choices: np.ndarray) -> np.ndarray:
    _, index = np.unique(choices, axis=0, return_index=True)
    return choices[np.sort(index)]


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


# -------------------------------------------------------------------------------------------- selection, verification


def verify(
    run: Run, engine: Engine, configs: dict[str, dict[str, str | None]], draws: Sequence[Draw], description: str
) -> dict[str, list[dict[str, Any]]]:
    """Measure named configurations on draws, each once (trials of their own store); return their figures per draw."""
    store = TrialStore(run.path("verified"))
    jobs = {(name, draw): Job(draw, labels) for name, labels in configs.items() for draw in draws}
    with bar(len(jobs), description) as progress:
        found = {key: store.get(job.key) for key, job in jobs.items()}
        todo = [key for key, record in found.items() if record is None]
        progress.update(len(jobs) - len(todo))
        for _ in engine.map("prepare", list(draws) if todo else []):
            pass
        for index, result in engine.map("measure", [jobs[key] for key in todo]):
            key = todo[index]
            found[key] = result
            store.put(jobs[key].key, result)
            progress.update()
    return {name: [found[name, draw] or {} for draw in draws] for name in configs}
