"""Fit the sampler's correction for a run's recipe with quantized activations."""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from quantdm.activations import usual_activations
from quantdm.correction import VARIANTS, Correction, fit_correction, load_correction, step_table
from quantdm.correction.fit import GLANCE, choose_variant, glanced
from quantdm.correction.levels import check_served
from quantdm.correction.record import CORRECTION_VERSION
from quantdm.errors import QuantDMError, told
from quantdm.files import check_output, digest, read_json, tensors_digest, write_json
from quantdm.machine import checked_device, cores
from quantdm.metrics.samples import Draw
from quantdm.pipelines.generate import generate
from quantdm.pipelines.loading import DiffusionPipeline
from quantdm.pipelines.text_memory import memoized_text_encoders
from quantdm.progress import bar
from quantdm.recipe import ActivationSpec, Recipe, load_recipe, weights_digest
from quantdm.recipe.activations import MAX_ACTIVATION_BITS, MIN_ACTIVATION_BITS
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import Evaluator, Job, configured
from quantdm.runs.final import run_key
from quantdm.runs.jobs import measure_jobs
from quantdm.runs.labels import labels_of, tables_of
from quantdm.runs.run import Run
from quantdm.runs.store import TrialStore
from quantdm.runs.tune import own_tuning


def correct_recipe(
    run: Run, *, bits: int, images: int, batch_size: int | Literal["auto"] = "auto", device: str | None = None
) -> Correction:
    """Fit the correction of a run's recipe at activations of 3 to 8 bits (16: not quantized), anew."""
    if bits != 16 and not MIN_ACTIVATION_BITS <= bits <= MAX_ACTIVATION_BITS:
        raise QuantDMError(
            f"bits: got {bits}, expected {MIN_ACTIVATION_BITS} to {MAX_ACTIVATION_BITS}, or 16 (not quantized)"
        )
    if images < 2 * FIT_DRAWS:
        raise QuantDMError(f"images: got {images}, expected {2 * FIT_DRAWS} or more, {FIT_DRAWS} draws of two")
    recipe = load_recipe(run.path("recipe.yaml"))
    check_output(run.folder, folder=True)
    subject = run.open_subject(device=None if device is None else checked_device(device))
    check_served(subject.pipe.scheduler)
    spec = None if bits == 16 else usual_activations(subject.denoiser, bits)
    workers = min(cores(), GLANCE) if subject.device.type == "cpu" else None  # each opens the pipeline
    with Engine(run, subject, workers=workers, batch_size=batch_size) as engine:
        tuned = own_tuning(run, labels_of(run, recipe, subject.layers))
        return load_correction(correct_run(run, engine, recipe, spec, images=images, anew=True, tuned=tuned))


FIT_DRAWS, TEST_DRAWS = 2, 4
STEPS_VERSION = 2
# Of the corrections of others those two that were ahead in eval/results/correction_study.json.
TRIED = (*VARIANTS, "qdrift", "stepbaq")


def correct_run(
    run: Run,
    engine: Engine,
    recipe: Recipe,
    activations: ActivationSpec | None,
    *,
    images: int,
    anew: bool = False,
    tuned: Path | None = None,
) -> Path:
    """Write correction.safetensors: noise statistics along full-precision trajectories, and the variant that helps.

    The variant is chosen by fid_fp on draws that neither the fit nor the final rows use. A correction that was fitted
    for the same weights and activations is kept, if not asked to fit `anew`; the old one lies there until then.

    Args:
        images: trajectories for the statistics, and again for each draw on which the variants run freely.
        tuned: the tuned weights of the recipe, if it is tuned.

    Raises:
        QuantDMError: the recipe does not fit the denoiser or quantizes further parts of the pipeline; images are NaN.
    """
    layers = engine.subject.layers
    labels, tables = labels_of(run, recipe, layers), tables_of(run, recipe, layers)
    path, record = run.path("correction.safetensors"), run.path("correction_steps.json")
    spec = None if activations is None else activations.model_dump(mode="json")
    tuning = None if tuned is None else tensors_digest(tuned)
    own = [] if tables == run.settings.embeddings else [tables]
    key = digest(CORRECTION_VERSION, weights_digest(labels), spec, images, *([] if tuning is None else [tuning]), *own)
    unfinished = run.path(f"correction-{key[:12]}.safetensors")
    whole = path.is_file() and record.is_file()
    if not anew and whole and read_json(record, version=STEPS_VERSION)["fitted_for"] == key:
        return path
    job = Job(Draw(0, 0, 0), labels, spec, tuned=None if tuned is None else str(tuned), embeddings=tables)
    joint = Recipe(model=recipe.model, layers=labels, activations=activations)
    with told(f"correction of {job.description}"):
        correction = _fit(run, engine.local, job, joint, images, unfinished)
        correction = _choose(run, engine, job, correction, images)
    steps = step_table(correction, engine.local.pipe.scheduler, run.settings.protocol.steps)
    correction.save(path)
    write_json(record, {"version": STEPS_VERSION, "fitted_for": key, "tuning": tuning, "steps": steps})  # last
    unfinished.unlink(missing_ok=True)
    return path


def _fit(run: Run, evaluator: Evaluator, job: Job, recipe: Recipe, images: int, kept: Path) -> Correction:
    """Return the statistics of a job, of no variant yet; those that were kept before an interruption, if any."""
    pipe, weights_only = evaluator.pipe, replace(job, activations=None)
    return fit_correction(
        pipe,
        lambda: configured(pipe, evaluator.bank, job, evaluator.tables),
        fit_runs=[_runner(run, draw, evaluator.batch_size) for draw in _draws(run, 50, FIT_DRAWS, images // FIT_DRAWS)],
        variant="none",
        # Weight noise is one fixed function of x: its regression slope is no gain error, so only the activation
        # noise is explained (docs/method.md, When not to correct).
        explained_from=None
        if job.activations is None
        else lambda: configured(pipe, evaluator.bank, weights_only, evaluator.tables),
        model=run.settings.model,
        recipe=recipe,
        resume=kept,
    )


def _choose(run: Run, engine: Engine, job: Job, correction: Correction, images: int) -> Correction:
    """Keep the variant that lowers fid_fp beyond noise; the draws of each are measured side by side."""
    store, draws, without = TrialStore(run.path("corrected")), _draws(run, 60, TEST_DRAWS, images), []
    with bar(len(TRIED) * len(draws), "correction: what helps?") as shown:

        def distances(given: str | None) -> Iterator[float]:
            for heat in (draws,) if given is None else (draws[:GLANCE], draws[GLANCE:]):
                jobs = [replace(job, draw=draw, correction=given) for draw in heat]
                work = {run_key(run, each): each for each in jobs}
                found = measure_jobs(engine, store, work, progress=shown)
                yield from (found[key]["fid_fp"] for key in work)

        def measure(candidate: Correction | None) -> list[float]:
            if candidate is not None:
                return glanced(distances(_written(candidate, store.folder)), without)
            without[:] = distances(None)
            return list(without)

        chosen = choose_variant(measure, correction, variants=TRIED)
        shown.total = shown.n  # measurements that were not needed are none that are missing
    return chosen


def _written(candidate: Correction, folder: Path) -> str:
    """Write a correction for all workers to read, of this driver and of others; its name is its content's."""
    new = candidate.save(folder / f".{uuid.uuid4().hex}.safetensors")
    return str(new.replace(folder / f"{tensors_digest(new)}.safetensors"))


def _draws(run: Run, first: int, count: int, images: int) -> list[Draw]:
    """Return `count` draws from that one on."""
    settings = run.settings
    return [Draw(settings.seed * 1000 + first + i, images, settings.protocol.steps) for i in range(count)]


def _runner(run: Run, draw: Draw, batch_size: int | Literal["auto"]) -> Callable[[DiffusionPipeline], torch.Tensor]:
    """Return what generates a draw."""

    def run_once(pipe: DiffusionPipeline) -> torch.Tensor:
        with told(f"draw {draw.base_seed}"), memoized_text_encoders(pipe):
            return generate(pipe, run.settings.protocol, draw.seeds, steps=draw.steps, batch_size=batch_size)

    return run_once
