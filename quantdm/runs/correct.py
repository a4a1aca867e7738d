"""Fit the sampler's correction for a run's recipe with quantized activations."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from quantdm.activations import default_keep_8bit
from quantdm.correction import Correction, fit_correction, load_correction, step_table
from quantdm.errors import QuantDMError
from quantdm.files import digest, read_json, write_json
from quantdm.metrics import batched, frechet_distance
from quantdm.metrics.samples import Draw
from quantdm.pipelines.generate import generate, memoized_text_encoders
from quantdm.pipelines.loading import DiffusionPipeline, load_pipeline
from quantdm.pipelines.parts import get_denoiser
from quantdm.recipe import ActivationSpec, Recipe, load_recipe
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import Job, configured
from quantdm.runs.run import Run
from quantdm.runs.search import open_engine


def correct_recipe(run: Run, *, bits: int, images: int) -> Correction:
    """Fit the correction of a run's recipe at 6-, 8- or 16-bit activations, anew."""
    if bits not in (6, 8, 16):
        raise QuantDMError(f"bits: got {bits}, expected 6, 8 or 16 (activations not quantized)")
    recipe = load_recipe(run.path("recipe.yaml"))
    pipe = load_pipeline(run.settings.model)
    spec = None if bits == 16 else activation_spec_of(get_denoiser(pipe), bits)
    run.path("correction.safetensors").unlink(missing_ok=True)
    with open_engine(run, pipe) as engine:
        return load_correction(correct_run(run, engine, recipe, spec, images=images))


def activation_spec_of(denoiser: nn.Module, bits: Literal[6, 8]) -> ActivationSpec:
    """Return dynamic activation quantization with the usual sensitive layers at 8 bits."""
    return ActivationSpec(bits=bits, keep_8bit=default_keep_8bit(denoiser))


FIT_DRAWS, TEST_DRAWS = 2, 4
STEPS_VERSION = 2


def correct_run(run: Run, engine: Engine, recipe: Recipe, activations: ActivationSpec | None, *, images: int) -> Path:
    """Write correction.safetensors: noise statistics along full-precision trajectories, and the variant that helps.

    The variant is chosen by fid_fp on draws that neither the fit nor the final rows use. A correction that was fitted
    for the same weights and activations is kept.

    Args:
        images: trajectories for the statistics, and again for each draw on which the variants run freely.
    """
    path, record = run.path("correction.safetensors"), run.path("correction_steps.json")
    key = digest(recipe.layers, None if activations is None else activations.model_dump(mode="json"), images)
    if path.is_file() and record.is_file() and read_json(record, version=STEPS_VERSION)["fitted_for"] == key:
        return path
    evaluator = engine.local
    settings = run.settings
    pipe = evaluator.pipe(settings.torch_dtype)
    spec = None if activations is None else activations.model_dump(mode="json")

    def draws(first: int, count: int, each: int) -> list[Draw]:
        return [Draw(settings.seed * 1000 + first + i, each, settings.protocol.steps) for i in range(count)]

    def runner(draw: Draw) -> Callable[[DiffusionPipeline], torch.Tensor]:
        def run_once(pipe: DiffusionPipeline) -> torch.Tensor:
            with memoized_text_encoders(pipe):
                return generate(pipe, settings.protocol, draw.seeds, steps=draw.steps, batch_size=draw.images)

        return run_once

    def distance(images_a: torch.Tensor, images_b: torch.Tensor) -> float:
        return frechet_distance(*(batched(evaluator.extractor, x) for x in (images_a, images_b)))

    job = Job(Draw(0, 0, 0), recipe.layers, spec)
    weights_only = Job(Draw(0, 0, 0), recipe.layers)
    correction = fit_correction(
        pipe,
        lambda: configured(pipe, evaluator.bank, job),
        fit_runs=[runner(draw) for draw in draws(50, FIT_DRAWS, images // FIT_DRAWS)],
        test_runs=[runner(draw) for draw in draws(60, TEST_DRAWS, images)],
        distance=distance,
        # Weight noise is one fixed function of x: its regression slope is no gain error, so only the activation noise
        # is explained (docs/method.md, When not to correct).
        explained_from=None if spec is None else lambda: configured(pipe, evaluator.bank, weights_only),
        model=settings.model,
    )
    steps = step_table(correction, pipe.scheduler, settings.protocol.steps)
    correction.save(path)
    write_json(record, {"version": STEPS_VERSION, "fitted_for": key, "steps": steps})  # last: it says the pair is whole
    return path
