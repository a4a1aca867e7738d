"""Sub-commands that make images: generate, bench, correct."""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Annotated

import typer

from quantdm.cli.app import AsJson, BatchSize, BegunRun, Device, Model, Out, ProtocolFile, app, batch_size_of
from quantdm.cli.given import recipe_given

if TYPE_CHECKING:
    from quantdm.correction import Correction


@app.command(epilog="Example: quantdm generate digits-sd -o digits.png --images 40")
def generate(
    model: Model,
    out: Out,
    images: Annotated[int, typer.Option(min=1, help="Number of images.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Image i has seed SEED * 1,000,000 + i.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps (default: the protocol's).")] = None,
    protocol: ProtocolFile = None,
    columns: Annotated[int, typer.Option(min=1, help="Images per row of the grid.")] = 10,
) -> None:
    """Generate images as one PNG grid."""
    from quantdm.cli.images import generate_grid

    path = generate_grid(model, out, images=images, seed=seed, steps=steps, protocol=protocol, columns=columns)
    typer.echo(f"images: {path}")


@app.command(epilog="Example: quantdm bench digits-dit --scheme kmeans-channel-4 --activations token-8")
def bench(
    model: Model,
    scheme: Annotated[str | None, typer.Option(help="Weights of every layer (default: kmeans-channel-4).")] = None,
    recipe: Annotated[Path | None, typer.Option(callback=recipe_given, help="Or those of this recipe.")] = None,
    activations: Annotated[
        str | None, typer.Option(help="Inputs of every layer (default: the model's or recipe's, else token-8).")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Made at once.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps (default: the protocol's).")] = None,
    protocol: ProtocolFile = None,
    as_json: AsJson = False,
) -> None:
    """Time the denoiser on this machine in every residency: ms per step, memory, agreement with the simulation."""
    from quantdm.cli.bench import bench_model, bench_text

    record = bench_model(
        model,
        scheme=scheme,
        recipe=recipe,
        activations=activations,
        images=images,
        steps=steps,
        protocol=protocol,
    )
    typer.echo(json.dumps(record, indent=1) if as_json else bench_text(record))


@app.command(epilog="Example: quantdm correct --run-dir runs/mine --bits 6")
def correct(
    run_dir: BegunRun,
    bits: Annotated[int, typer.Option(help="Activation bits: 3 to 8, or 16 (not quantized).")] = 6,
    images: Annotated[int, typer.Option(help="Trajectories for the noise statistics.")] = 128,
    batch_size: BatchSize = "auto",
    device: Device = None,
) -> None:
    """Fit the correction of the sampler for a run's recipe and print which variant helps."""
    from quantdm.runs.correct import correct_recipe
    from quantdm.runs.failure import told_why
    from quantdm.runs.run import Run

    run = Run.open(run_dir)
    with told_why(run.folder):
        correction = correct_recipe(run, bits=bits, images=images, batch_size=batch_size_of(batch_size), device=device)
    for line in _told(correction):
        typer.echo(line)
    typer.echo(f"correction: {run.path('correction.safetensors')}")


def _told(correction: "Correction") -> list[str]:
    """Return how far from full precision every variant was, what is kept, and what follows."""
    from quantdm.metrics.statistics import spread

    lines = []
    for name, found in correction.measured.items():
        figure = spread(mean(found), stdev(found))
        lines.append(
            f"{name:<28} fid_fp {figure} ({len(found)} draws){'  <- kept' if name == correction.choice else ''}"
        )
    if correction.choice == "none":
        lines.append("None is closer to full precision than no correction beyond noise, so none is in use.")
    return lines
