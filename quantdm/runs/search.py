"""The search: from a pipeline and a size to a recipe, through every stage, resumable at any moment."""

from collections.abc import Sequence
from pathlib import Path

import torch

from quantdm.files import check_output
from quantdm.pipelines.fingerprint import fingerprint
from quantdm.pipelines.loading import DiffusionPipeline, load_pipeline
from quantdm.pipelines.parts import get_denoiser
from quantdm.pipelines.protocol import Protocol, load_protocol
from quantdm.recipe import Recipe
from quantdm.runs.choose import choose
from quantdm.runs.engines.local import Engine
from quantdm.runs.explain import explain, fit_surrogates
from quantdm.runs.run import Run
from quantdm.runs.settings import FULL, FULL_TRIALS, QUICK, Effort, make_settings
from quantdm.runs.stages import build_bank, describe, measure_space
from quantdm.runs.trials import load_trials, run_trials
from quantdm.schemes import DEFAULT_OPTIONS, Scheme


def start_run(
    model: str,
    run_dir: str | Path,
    *,
    target_bits: float | None = None,
    target_bytes: int | None = None,
    trials: int = FULL_TRIALS,
    seed: int = 0,
    protocol: str | None = None,
    quick: bool = False,
) -> tuple[DiffusionPipeline, Run]:
    """Load a pipeline and start (or go on with) a run of it."""
    check_output(run_dir, folder=True)
    pipe = load_pipeline(model)
    settings = make_settings(
        pipe,
        target_bits=target_bits,
        target_bytes=target_bytes,
        trials=trials,
        seed=seed,
        protocol=None if protocol is None else load_protocol(protocol),
        effort=QUICK if quick else FULL,
    )
    return pipe, Run.create(run_dir, settings)


def search(
    pipe: DiffusionPipeline,
    *,
    target_bits: float | None = None,
    target_bytes: int | None = None,
    trials: int = 160,
    run_dir: str | Path,
    seed: int = 0,
    options: Sequence[Scheme] = DEFAULT_OPTIONS,
    protocol: Protocol | None = None,
    effort: Effort = FULL,
    workers: int | None = None,
) -> Recipe:
    """Find the configuration of a pipeline's denoiser that keeps the images closest at a given size.

    Args:
        pipe: the full-precision pipeline; its denoiser is left as it was.
        target_bits: average bits per quantizable weight, codebooks and scales included.
        target_bytes: or the size of the denoiser on disk.
        trials: configurations whose images are measured.
        run_dir: where every stage leaves its record; the same call goes on where it was interrupted.
        seed: determines the sampled configurations, all noises and the surrogates.
        options: the schemes that every layer may take.
        protocol: what images are asked for (None: the shipped one of the model's name).
        effort: images and steps per measurement.
        workers: processes (None: one per core where the pipeline can be loaded again from its source).

    Returns:
        The recipe; it lies in `run_dir/recipe.yaml` too.

    Raises:
        QuantDMError: target out of reach (the range is stated), too few trials, no protocol, a run directory that
            belongs to another run.
    """
    check_output(run_dir, folder=True)
    settings = make_settings(
        pipe,
        target_bits=target_bits,
        target_bytes=target_bytes,
        trials=trials,
        seed=seed,
        options=options,
        protocol=protocol,
        effort=effort,
    )
    run = Run.create(run_dir, settings)
    with open_engine(run, pipe, workers=workers) as engine:
        return find_recipe(run, engine, pipe)


def find_recipe(run: Run, engine: Engine, pipe: DiffusionPipeline) -> Recipe:
    """Run every stage of the search that has no record yet."""
    denoiser = get_denoiser(pipe)
    describe(run, denoiser)
    bank = build_bank(run, pipe)
    space = measure_space(run, engine, denoiser, bank)
    run_trials(run, engine, space)
    fitted = fit_surrogates(run, space, *load_trials(run, space))
    return choose(run, engine, space, explain(run, fitted), fitted["graph"])


def open_engine(run: Run, pipe: DiffusionPipeline, *, workers: int | None = None) -> Engine:
    """Return an engine that works on the pipeline's source where it can be loaded again, else on the live pipeline."""
    source = run.settings.model
    same = bool(source) and fingerprint(get_denoiser(load_pipeline(source))) == run.settings.fingerprint
    on_cpu = get_denoiser(pipe).device == torch.device("cpu")
    return Engine(run, pipe=None if same and on_cpu else pipe, workers=workers)
