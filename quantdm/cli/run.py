"""Sub-commands that walk the whole way, and the tuning alone."""

from pathlib import Path
from typing import Annotated

import typer

from quantdm.cli.app import (
    SEARCH,
    BatchSize,
    BegunRun,
    Device,
    DryRun,
    Dtype,
    EffortName,
    Embeddings,
    EngineName,
    ExampleInputs,
    Fidelity,
    LearnedFrom,
    Model,
    Options,
    ProtocolFile,
    RayAddress,
    Seed,
    TargetBits,
    TargetBytes,
    TargetPipelineBytes,
    Trials,
    Workers,
    app,
    batch_size_of,
    given_inputs,
    table_scheme,
)
from quantdm.cli.given import schemes_of
from quantdm.schemes import TABLE_SCHEME

Minutes = Annotated[
    float | None,
    typer.Option(min=0.1, help="Trials end in time for the other stages; run it again for the rest."),
]
GpuHours = Annotated[float | None, typer.Option(min=0.01, help="The same, summed over accelerators.")]
Tune = Annotated[bool, typer.Option("--tune/--no-tune", help="Train what decodes the recipe.", rich_help_panel=SEARCH)]


@app.command(epilog="Example: quantdm demo --model digits-sd --target-bits 3.0")
def demo(
    model: Annotated[str, typer.Option(help="Embedded pipeline: digits-dit, digits-flow or digits-sd.")] = "digits-dit",
    target_bits: Annotated[float, typer.Option(help="Average bits per weight, overhead included.")] = 3.0,
    run_dir: Annotated[Path | None, typer.Option(help="Run directory (default: runs/MODEL-BITSbit).")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Every stage with fewer trials and images: a few minutes.")
    ] = False,
    seed: Seed = 0,
    batch_size: BatchSize = "auto",
    device: Device = None,
    dtype: Dtype = None,
    minutes: Minutes = None,
    dry_run: DryRun = False,
) -> None:
    """Run everything on an embedded pipeline: search, recipe, export, report. Run it again to go on."""
    from quantdm.corridor.demo import demo

    demo(
        model,
        target_bits=target_bits,
        run_dir=run_dir,
        quick=quick,
        seed=seed,
        batch_size=batch_size_of(batch_size), device=device, dtype=dtype, minutes=minutes, dry_run=dry_run,
        say=typer.echo,
    )  # fmt: skip


@app.command(epilog="Example: quantdm run digits-sd --target-bits 3.0 --effort quick")
def run(
    model: Model,
    target_bits: TargetBits = None,
    target_bytes: TargetBytes = None, target_pipeline_bytes: TargetPipelineBytes = None,
    run_dir: Annotated[Path | None, typer.Option(help="Run directory (default: runs/MODEL-SIZE).")] = None,
    effort: EffortName = "normal", trials: Trials = None, options: Options = None,
    protocol: ProtocolFile = None,
    seed: Seed = 0,
    workers: Workers = None,
    embeddings: Embeddings = TABLE_SCHEME.label,
    tune: Tune = True,
    example_inputs: ExampleInputs = None,
    batch_size: BatchSize = "auto", device: Device = None, dtype: Dtype = None, minutes: Minutes = None,
    gpu_hours: GpuHours = None,
    dry_run: DryRun = False,
    engine: EngineName = "local", ray_address: RayAddress = None, fidelity: Fidelity = None,
    learned_from: LearnedFrom = None,
) -> None:  # fmt: skip
    """Make your own pipeline small: search, tune, measure, export, report. Run it again to go on."""
    from quantdm.corridor.run import run
    from quantdm.pipelines.protocol import load_protocol

    run(
        model,
        target_bits=target_bits,
        target_bytes=target_bytes,
        target_pipeline_bytes=target_pipeline_bytes,
        run_dir=run_dir,
        effort=effort,
        trials=trials,
        options=schemes_of(options),
        protocol=None if protocol is None else load_protocol(protocol),
        seed=seed, workers=workers, tuned=tune,
        example_inputs=given_inputs(example_inputs),
        embeddings=table_scheme(embeddings),
        batch_size=batch_size_of(batch_size), device=device, dtype=dtype, minutes=minutes, dry_run=dry_run,
        gpu_hours=gpu_hours, engine=engine, ray_address=ray_address, fidelity=fidelity,
        learned_from=learned_from or (),
        say=typer.echo,
    )  # fmt: skip


@app.command(epilog="Example: quantdm tune --run-dir runs/mine --steps 1000")
def tune(
    run_dir: BegunRun,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 400,
    images: Annotated[int, typer.Option(min=1, help="Full-precision trajectories to train on.")] = 128,
    rows: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 32,
    batch_size: BatchSize = "auto",
    device: Device = None,
) -> None:
    """Train tables, scales, biases and norms of a run's recipe; kept if every draw says it helps."""
    from quantdm.files import read_json
    from quantdm.metrics.statistics import spread
    from quantdm.runs.failure import told_why
    from quantdm.runs.run import Run
    from quantdm.runs.tune import TUNING_FILE, tune_recipe
    from quantdm.tuning import TuneSettings

    run = Run.open(run_dir)
    settings = TuneSettings(steps=steps, rows=rows)
    with told_why(run.folder):
        path = tune_recipe(run, settings, images=images, batch_size=batch_size_of(batch_size), device=device)
    record = read_json(run.path(TUNING_FILE))
    for part, curve in record["curve"].items():
        typer.echo(f"{part}: held-out error {curve[0][1]:.4g} -> {min(loss for _, loss in curve):.4g}")
    for name, figures in record["figures"].items():
        typer.echo(f"{name:<8} fid_fp {spread(figures['mean']['fid_fp'], figures['sd']['fid_fp'])}")
    typer.echo(f"tuned: {path}" if path else "tuned: left out, it does not help on every draw")
