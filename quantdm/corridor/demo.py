"""The main job: an embedded pipeline walks in, a smaller one with a report walks out."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantdm.corridor.export import export_run
from quantdm.corridor.table import show_table
from quantdm.files import check_replaceable
from quantdm.hub.replace import check_export_path
from quantdm.hub.size import ExportSize, denoiser_bytes
from quantdm.pipelines.subject import Subject, look_at
from quantdm.recipe import Recipe
from quantdm.report import write_report
from quantdm.report.insight_files import save_insights
from quantdm.report.page import REPORT_FILE
from quantdm.runs import final
from quantdm.runs.choose import choose
from quantdm.runs.correct import activation_spec_of, correct_run
from quantdm.runs.engines.local import Engine
from quantdm.runs.explain import explain, fit_surrogates
from quantdm.runs.run import Run
from quantdm.runs.search import start_run
from quantdm.runs.settings import FULL, FULL_TRIALS, QUICK, QUICK_TRIALS
from quantdm.runs.stages import build_bank, describe, measure_space
from quantdm.runs.trials import load_trials, run_trials
from quantdm.surrogates import SearchSpace

ACTIVATION_BITS = 6
FINAL_IMAGES, CORRECTION_IMAGES = {False: 1000, True: 200}, {False: 128, True: 32}  # quick or not


Say = Callable[[str], object]


def demo(
    model: str = "digits-dit",
    *,
    target_bits: float = 3.0,
    run_dir: str | Path | None = None,
    quick: bool = False,
    seed: int = 0,
    workers: int | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Run the whole corridor on one pipeline and return its summary.

    The run directory ends with recipe.yaml, export/, summary.json and report.html; running it again goes on where it
    stopped.

    Raises:
        QuantDMError: unknown pipeline, target out of reach, or a run directory of another run.
    """
    start = time.monotonic()
    say(f"[1/9] load {model}")
    folder = run_dir or Path("runs") / f"{Path(model).name}-{target_bits:g}bit{'-quick' if quick else ''}"
    run, subject = start_run(
        look_at(model),
        folder,
        target_bits=target_bits,
        trials=QUICK_TRIALS if quick else FULL_TRIALS,
        seed=seed,
        effort=QUICK if quick else FULL,
    )
    _check_places(run)
    weights = sum(layer.num_weights for layer in subject.layers)
    say(f"      {len(subject.layers)} layers, {weights:,} quantizable weights; run directory {run.folder}")
    with Engine(run, subject, workers=workers) as engine:
        space, recipe = _search(run, engine, subject, say)
        summary = _measure(run, engine, space, recipe, say, quick=quick)
    say("[9/9] export and report")
    export = export_run(run, run.path("export"), say=say)
    report = write_report(run.folder)
    save_insights(run.folder)
    show_table(summary)
    say(f"export:  {export}  (denoiser {denoiser_bytes(export, subject.pipe) / 1e6:.2f} MB on disk)")
    say(f"report:  {report}")
    say(f"done in {(time.monotonic() - start) / 60:.1f} minutes")
    return summary


def _search(run: Run, engine: Engine, subject: Subject, say: Say) -> tuple[SearchSpace, Recipe]:
    """Find the recipe, stage by stage."""
    say(f"[2/9] quantize every layer with {len(run.settings.options)} options")
    describe(run, subject)
    bank = build_bank(run, subject)
    say("[3/9] how sensitive is each layer?")
    space = measure_space(run, engine, subject, bank)
    say(f"[4/9] measure {run.settings.trials} sampled configurations (processes: {engine.workers})")
    run_trials(run, engine, space)
    say("[5/9] learn image quality from configurations, and explain it")
    fitted = fit_surrogates(run, space, *load_trials(run, space))
    attributions = explain(run, fitted)
    say("[6/9] choose and verify")
    recipe = choose(run, engine, space, attributions, fitted["graph"])
    say(f"      recipe: {recipe.avg_bits:.3f} bits per weight ({recipe.provenance.source})")
    return space, recipe


def _measure(run: Run, engine: Engine, space: SearchSpace, recipe: Recipe, say: Say, *, quick: bool) -> dict[str, Any]:
    """Add activations and the correction, and measure everything on noises that the search never saw."""
    subject = engine.subject
    say("[7/9] 6-bit activations and the sampler's correction")
    spec = activation_spec_of(subject.denoiser, ACTIVATION_BITS)
    correction = correct_run(run, engine, recipe, spec, images=CORRECTION_IMAGES[quick])
    say("[8/9] measure the result on noises that the search never saw")
    draws = final.final_draws(run, images=FINAL_IMAGES[quick])
    jobs = final.final_jobs(run, space, recipe, spec, str(correction))
    rows = final.measure_rows(run, engine, space, jobs, draws, ExportSize(subject.pipe))
    final.save_grids(run, engine, jobs, draws[0])
    return final.write_summary(run, rows, draws, final.sampling_noise(engine, draws))


def _check_places(run: Run) -> None:
    """Check, before anything is computed, that the last stages may write what they make."""
    check_export_path(run.path("export"), run.location, apart_from=run.folder)
    check_replaceable(run.path(REPORT_FILE))
