"""The tuning of a run's recipe: trained along full-precision trajectories, kept if it measurably helps."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from quantdm.denoisers.calls import Call
from quantdm.files import check_output, digest, read_json, tensors_digest, write_json
from quantdm.hub.export import lossless_dtype
from quantdm.machine import checked_device
from quantdm.metrics.samples import Draw
from quantdm.metrics.statistics import mean_and_sd
from quantdm.pipelines.generate import generate
from quantdm.pipelines.loading import DiffusionPipeline
from quantdm.pipelines.parts import find_denoisers
from quantdm.pipelines.subject import Subject
from quantdm.progress import bar
from quantdm.quantizers import QuantizedWeight
from quantdm.recipe import Recipe, load_recipe, weights_digest
from quantdm.recipe.joint import joint_prefix, split_name
from quantdm.runs.choose import verification_draws
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import Job
from quantdm.runs.jobs import measure_jobs
from quantdm.runs.labels import labels_of, tables_of
from quantdm.runs.run import Run
from quantdm.runs.store import TrialStore
from quantdm.runs.tuned import TUNED_FILE, TunedWeights
from quantdm.runs.verify import plain
from quantdm.schemes import Scheme
from quantdm.tuning import Tuned, TuneSettings, tune

TUNING_VERSION = 1
TUNING_FILE = "tuning.json"
TRAIN_SEED, HELD_OUT_SEED = 910, 920  # base seeds of the trajectories: outside those of every draw
HELD_OUT_IMAGES, FEWEST = 32, 16  # at most and at least; else as many as there are to train on


def tune_run(
    run: Run, engine: Engine, recipe: Recipe, settings: TuneSettings, *, images: int, folder: Path | None = None
) -> Path | None:
    """Write tuned.safetensors and tuning.json; return the former's path if the tuned recipe is better, else None.

    It is better if its fid_fp is lower on every draw of the verification. A tuning of the same recipe and settings is
    kept, an interrupted one goes on.

    Args:
        images: full-precision trajectories that are trained on.
        folder: where both files are written (None: the run's directory, where its recipe is exported from).

    Raises:
        QuantDMError: the recipe does not fit the denoiser or quantizes further parts of the pipeline.
    """
    subject = engine.subject
    labels, tables = labels_of(run, recipe, subject.layers), tables_of(run, recipe, subject.layers)
    folder = folder or run.folder
    path, record = folder / TUNED_FILE, folder / TUNING_FILE
    own = [] if tables == run.settings.embeddings else [tables]  # under which both are compared
    inputs = digest(weights_digest(labels), vars(settings), images, run.settings.sweeps, *own)
    if not (record.is_file() and read_json(record, version=TUNING_VERSION)["inputs"] == inputs and path.is_file()):
        start = time.monotonic()
        found = _train(run, engine, labels, settings, images, folder, inputs)
        seconds = round(time.monotonic() - start, 1)
        record.unlink(missing_ok=True)  # first: what it says is of the weights before
        _joined(found).save(path)
        figures = _compare(run, engine, Job(Draw(0, 0, 0), labels, embeddings=tables), path)
        better = all(b["fid_fp"] < a["fid_fp"] for a, b in zip(figures["untuned"], figures["tuned"], strict=True))
        write_json(
            record,
            {
                "version": TUNING_VERSION,
                "inputs": inputs,
                "tuned": tensors_digest(path),
                "settings": vars(settings) | {"images": images},
                "curve": {part: tuned.curve for part, tuned in found.items()},
                "figures": {name: mean_and_sd(rows) for name, rows in figures.items()},
                "used": better and any(tuned.helps for tuned in found.values()),
                "seconds": seconds,
            },
        )
    for checkpoint in folder.glob("tuning-*.safetensors"):  # only now: what was trained is recorded
        checkpoint.unlink()
    return _used(folder)


def tune_recipe(
    run: Run,
    settings: TuneSettings,
    *,
    images: int,
    batch_size: int | Literal["auto"] = "auto",
    device: str | None = None,
) -> Path | None:
    """Tune the recipe of a run that has chosen one, see `tune_run`."""
    recipe = load_recipe(run.path("recipe.yaml"))
    check_output(run.folder, folder=True)
    subject = run.open_subject(device=None if device is None else checked_device(device))
    with Engine(run, subject, batch_size=batch_size) as engine:
        return tune_run(run, engine, recipe, settings, images=images)


def used_tuning(run: Run) -> Path | None:
    """Return the tuned weights of a run, if it has some that are better than the untuned ones."""
    return _used(run.folder)


def _used(folder: Path) -> Path | None:
    path, record_path = folder / TUNED_FILE, folder / TUNING_FILE
    if not record_path.is_file() or not path.is_file():
        return None
    record = read_json(record_path, version=TUNING_VERSION)
    return path if record["used"] and record["tuned"] == tensors_digest(path) else None


def own_tuning(run: Run, labels: Mapping[str, str | None]) -> Path | None:
    """Return the tuned weights of a run if they are in use and of this configuration, as a changed recipe is not."""
    path = used_tuning(run)
    return path if path is not None and not TunedWeights.load(path).differing(labels) else None


def _train(
    run: Run,
    engine: Engine,
    labels: Mapping[str, str | None],
    settings: TuneSettings,
    images: int,
    folder: Path,
    inputs: str,
) -> dict[str, Tuned]:
    """Tune every denoiser on its own calls."""
    subject, bank = engine.subject, engine.local.bank
    exact = subject.in_dtype(torch.float32)
    denoisers = find_denoisers(exact)
    calls, held_out = (
        _record(run, subject, exact, seed, count, engine.batch_size)
        for seed, count in ((TRAIN_SEED, images), (HELD_OUT_SEED, min(max(images, FEWEST), HELD_OUT_IMAGES)))
    )
    found: dict[str, Tuned] = {}
    with bar(settings.steps * len(subject.part_names), "tune: steps") as progress:
        for part in subject.part_names:
            weights: dict[str, QuantizedWeight] = {}
            for name, label in labels.items():
                owner, own = split_name(name, subject.part_names)
                if owner == part and label is not None:
                    weights[own] = bank.get(name, Scheme.parse(label))
            found[part] = tune(
                denoisers[part],
                weights,
                calls[part],
                held_out[part],
                settings,
                others_dtype=lossless_dtype(subject.denoisers[part]),
                checkpoint=folder / f"tuning-{digest(inputs, part)}.safetensors",
                progress=progress.update,
            )
    return found


def _record(
    run: Run, subject: Subject, exact: DiffusionPipeline, seed: int, images: int, batch_size: int | Literal["auto"]
) -> dict[str, list[Call]]:
    """Return every denoiser's calls along full-precision trajectories."""
    first = (run.settings.seed * 1000 + seed) * 10**6
    with subject.recording(exact) as recorded:
        generate(exact, run.settings.protocol, range(first, first + images), batch_size=batch_size)
    return {part: recording.calls for part, recording in recorded.items()}


def _joined(found: Mapping[str, Tuned]) -> TunedWeights:
    """Return what was tuned under joint names."""
    weights, others = {}, {}
    for number, (part, tuned) in enumerate(found.items()):
        prefix = joint_prefix(part, number)
        weights |= {prefix + name: weight for name, weight in tuned.weights.items()}
        others |= {prefix + name: value for name, value in tuned.others.items()}
    return TunedWeights(weights, others)


def _compare(run: Run, engine: Engine, job: Job, path: Path) -> dict[str, list[dict[str, Any]]]:
    """Measure the recipe with and without its tuning on the draws of the verification; what it has measured is kept."""
    draws, store = verification_draws(run), TrialStore(run.path("verified"))
    untuned = {each.key: each for draw in draws if (each := replace(job, draw=draw))}
    with bar(len(draws), "tune: compare, untuned") as progress:
        found = measure_jobs(engine, store, untuned, progress=progress, method="measure_paired")
    rows: list[dict[str, Any]] = [{}] * len(draws)
    with bar(len(draws), "tune: compare, tuned") as progress:
        for index, result in engine.map("measure", [replace(job, draw=draw, tuned=str(path)) for draw in draws]):
            rows[index] = result
            progress.update()
    return {"untuned": [plain(found[key]) for key in untuned], "tuned": rows}


def tuning_of(run: Run) -> dict[str, Any] | None:
    """Return what a summary says about the tuning: its settings, held-out curve, figures, and whether it is used."""
    if not run.path(TUNING_FILE).is_file():
        return None
    record = read_json(run.path(TUNING_FILE), version=TUNING_VERSION)
    return {key: record[key] for key in ("settings", "curve", "figures", "used", "seconds")}
