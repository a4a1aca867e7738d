"""The main job: an embedded pipeline walks in, a smaller one with a report walks out."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from torch import nn

from quantdm.correct import correct_run
from quantdm.correction import Correction, load_correction
from quantdm.denoisers.layers import list_layers
from quantdm.denoisers.pipeline import DiffusionPipeline, get_denoiser, load_pipeline
from quantdm.denoisers.protocol import load_protocol
from quantdm.errors import QuantDMError
from quantdm.export import denoiser_bytes, export_pipeline
from quantdm.modules import default_keep_8bit
from quantdm.recipe import ActivationSpec, load_recipe
from quantdm.report import write_report
from quantdm.report.insight_files import save_insights
from quantdm.search import final, stages
from quantdm.search.bank import WeightBank
from quantdm.search.run import Run
from quantdm.search.search import FULL, MIN_TRIALS, QUICK, choose, make_settings, open_engine, unquantized_bytes

ACTIVATION_BITS = 6


FULL_TRIALS, QUICK_TRIALS = 160, MIN_TRIALS
FINAL_IMAGES, CORRECTION_IMAGES = {False: 1000, True: 200}, {False: 128, True: 32}  # quick or not


def demo(
    model: str = "digits-dit",
    *,
    target_bits: float = 3.0,
    run_dir: str | Path | None = None,
    quick: bool = False,
    seed: int = 0,
    workers: int | None = None,
    say: Callable[[str], object] = print,
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
    trials = QUICK_TRIALS if quick else FULL_TRIALS
    pipe, run = start_run(model, folder, target_bits=target_bits, trials=trials, seed=seed, quick=quick)
    denoiser = get_denoiser(pipe)
    layers = list_layers(denoiser)
    weights = sum(layer.num_weights for layer in layers)
    say(f"      {len(layers)} layers, {weights:,} quantizable weights; run directory {run.folder}")
    with open_engine(run, pipe, workers=workers) as engine:
        say(f"[2/9] quantize every layer with {len(run.settings.options)} options")
        stages.describe(run, denoiser)
        bank = stages.build_bank(run, pipe)
        say("[3/9] how sensitive is each layer?")
        space = stages.measure_space(run, engine, denoiser, bank)
        say(f"[4/9] measure {trials} sampled configurations (processes: {engine.workers})")
        stages.run_trials(run, engine, space)
        say("[5/9] learn image quality from configurations, and explain it")
        fitted = stages.fit_surrogates(run, space, *stages.load_trials(run, space))
        attributions = stages.explain(run, fitted)
        say("[6/9] choose and verify")
        recipe = choose(run, engine, space, attributions, fitted["graph"])
        say(f"      recipe: {recipe.avg_bits:.3f} bits per weight ({recipe.provenance.source})")
        say("[7/9] 6-bit activations and the sampler's correction")
        spec = activation_spec_of(denoiser, ACTIVATION_BITS)
        correction = correct_run(run, engine, recipe, spec, images=CORRECTION_IMAGES[quick])
        say("[8/9] measure the result on noises that the search never saw")
        draws = final.final_draws(run, images=FINAL_IMAGES[quick])
        jobs = final.final_jobs(run, space, recipe, spec, str(correction))
        rows = final.measure_rows(run, engine, space, jobs, draws, unquantized_bytes(layers, denoiser))
        final.save_grids(run, engine, jobs, draws[0])
        summary = final.write_summary(run, rows, draws, final.sampling_noise(engine, draws))
    say("[9/9] export and report")
    export = export_run(run, run.path("export"))
    report = write_report(run.folder)
    save_insights(run.folder)
    show_table(summary)
    say(f"export:  {export}  (denoiser {denoiser_bytes(export, pipe) / 1e6:.2f} MB on disk)")
    say(f"report:  {report}")
    say(f"done in {(time.monotonic() - start) / 60:.1f} minutes")
    return summary


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


def export_run(run: Run, folder: str | Path) -> Path:
    """Write a run's recipe, applied, as a directory that plain diffusers opens."""
    recipe = load_recipe(run.path("recipe.yaml"))
    layers = list_layers(get_denoiser(load_pipeline(run.settings.model)))
    bank = WeightBank.open(run.path("bank"), layers, run.settings.schemes)
    correction = run.path("correction.safetensors")
    return export_pipeline(
        run.settings.model, recipe, folder, bank=bank, correction=correction if correction.is_file() else None
    )


def show_table(summary: dict[str, Any], console: Console | None = None) -> None:
    """Print the result rows, at most 79 columns wide."""
    table = Table(
        title=f"{summary['model']}: mean ± sd over {len(summary['protocol']['draws'])} draws", title_style="bold"
    )
    for name in ("", "bits", "MB", "fid_fp", "psnr", "fid_real"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for row in summary["rows"]:
        table.add_row(
            row["name"],
            f"{row['avg_bits']:.2f}",
            f"{row['denoiser_bytes'] / 1e6:.2f}",
            f"{row['fid_fp']:.4f} ± {row['fid_fp_sd']:.4f}",
            "-" if row["psnr_fp"] is None else f"{row['psnr_fp']:.1f}",
            f"{row['fid_real']:.3f}" if "fid_real" in row else "-",
        )
    console = console or Console(width=79)
    console.print(table)
    protocol, noise = summary["protocol"], summary["fp_noise"]
    console.print(
        f"{protocol['images']} images per draw, {protocol['steps']} steps. "
        f"Two full-precision draws of different noises are {noise['mean']:.4f} apart."
    )
