"""`quantdm evaluate`: a pipeline, images on disk, a table of pipelines; each also as a script in eval/."""

import difflib
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from quantdm.cli.app import AsJson, Model, ProtocolFile, app
from quantdm.errors import QuantDMError, counted

PIPELINE = "pipeline"  # what is meant if no sub-command is named


class _OrPipeline(TyperGroup):
    """A group whose first argument may also be the pipeline to measure, as it always was."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the sub-command in that measures a pipeline where none is named.

        Raises:
            QuantDMError: what is named is nothing here, and nearly a sub-command.
        """
        if args and args[0] not in (*self.commands, "--help"):
            near = difflib.get_close_matches(args[0], self.commands, n=1, cutoff=0.75)
            if near and not os.path.lexists(args[0]):
                raise QuantDMError(
                    f"evaluate: {args[0]!r} is no command and no pipeline here; did you mean {near[0]!r}?"
                )
            args = [PIPELINE, *args]
        return super().parse_args(ctx, args)


evaluate_app = typer.Typer(
    cls=_OrPipeline,
    no_args_is_help=True,
    help="Measure a pipeline, or images: `evaluate MODEL` is short for `evaluate pipeline MODEL`.",
    epilog="Example: quantdm evaluate runs/mine/export --reference digits-dit",
)
app.add_typer(evaluate_app, name="evaluate")

Images = Annotated[int, typer.Option(help="Images per draw, 2 or more.")]
Seeds = Annotated[str, typer.Option(help="Base seeds, one draw each.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps (default: the protocol's).")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Images at once at most (default: from memory).")]
Clip = Annotated[str | None, typer.Option(help="CLIP model (directory or cached id), for CLIP score.")]
Lpips = Annotated[bool, typer.Option("--lpips", help="LPIPS too, with AlexNet from torch's cache.")]


def numbers(text: str) -> tuple[int, ...]:
    """Read whole numbers with commas between.

    Raises:
        QuantDMError: something else.
    """
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise QuantDMError(
            f"seeds: got {text!r}, expected whole numbers with commas between, e.g. 101,102,103"
        ) from None


@evaluate_app.command(PIPELINE, epilog="Example: quantdm evaluate runs/mine/export --reference digits-dit")
def pipeline(
    model: Model,
    reference: Annotated[str | None, typer.Option(help="Full-precision pipeline, given the same noises.")] = None,
    images: Images = 1000,
    seeds: Seeds = "101,102,103",
    steps: Steps = None,
    protocol: ProtocolFile = None,
    as_json: AsJson = False,
) -> None:
    """Measure a pipeline: FID to full precision with equal noise, paired error, FID to real images.

    `quantdm evaluate MODEL` is short for `quantdm evaluate pipeline MODEL`.
    """
    from quantdm.cli.images import evaluate_model
    from quantdm.metrics.feature_sets import ENOUGH
    from quantdm.metrics.statistics import spread

    draws = numbers(seeds)
    result = evaluate_model(model, reference=reference, images=images, seeds=draws, steps=steps, protocol=protocol)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    how = result["protocol"]
    typer.echo(
        f"{model}: {counted(images, 'image')}, {counted(how['steps'], 'step')}, on {counted(len(draws), 'draw')} of "
        f"noises (seeds {seeds})"
    )
    typer.echo(f"features: {how['features']} ({how['flavour']})")
    for key, value in result["mean"].items():
        typer.echo(f"  {key:<10} " + ("-" if value is None else spread(value, result["sd"][key])))
    if len(draws) > 1:
        typer.echo("  mean ± standard deviation over the draws")
    if result["flagged"] or result["constant"]:
        typer.echo(
            f"  of {counted(images * len(draws), 'image')} a safety checker flagged {result['flagged']}, and "
            f"{result['constant']} others have one colour only"
        )
    if images < ENOUGH:
        typer.echo(f"  fewer than {ENOUGH:,} images: compare Frechet distances of equally many only")


@evaluate_app.command(epilog="Example: accelerate launch eval/generate.py digits-dit -o images/fp --images 10000")
def generate(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; run again to go on.")],
    images: Annotated[int, typer.Option(min=1, help="How many.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Image i has seed SEED * 1,000,000 + i.")] = 101,
    steps: Steps = None,
    protocol: ProtocolFile = None,
    batch_size: BatchSize = None,
    shard: Annotated[
        str | None, typer.Option(help="K/N: the share of this process, K from 0 (default: as launched).")
    ] = None,
    latents: Annotated[bool, typer.Option("--latents", help="Write latents instead of pictures.")] = False,
    recipe: Annotated[Path | None, typer.Option(help="Quantize by this recipe first.")] = None,
) -> None:
    """Generate images to a folder, one seed each: resumed, and shared among processes."""
    from quantdm.cli.rows import open_row
    from quantdm.metrics.samples import Draw
    from quantdm.metrics.to_folder import generate_to_folder, shard_of_environment

    pipe, chosen = open_row(str(recipe) if recipe else model, model, protocol)
    draw = Draw(seed, images, steps or chosen.steps)
    made = generate_to_folder(
        pipe, chosen, draw.seeds, out, steps=steps, batch_size=batch_size or "auto",
        shard=shard_of_environment() if shard is None else _shard(shard), latents=latents,
    )  # fmt: skip
    typer.echo(f"images: {out} ({made} new)")


def _shard(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit()):
        raise QuantDMError(f"shard: got {text!r}, expected K/N, e.g. 0/4")
    return int(number), int(count)


@evaluate_app.command(
    epilog="Example: quantdm evaluate table digits-dit recipes/digits-dit-3.0bit-a16.yaml kmeans-channel-4 -o table"
)
def table(
    reference: Annotated[str, typer.Argument(help="Full precision: the first row.")],
    rows: Annotated[list[str], typer.Argument(help="Pipelines, recipes (.yaml) or schemes; LABEL=ROW names one.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for images and tables; run again to go on.")],
    images: Images = 1000,
    seeds: Seeds = "101,102,103",
    steps: Steps = None,
    protocol: ProtocolFile = None,
    features: Annotated[
        str, typer.Option(help="Names with commas between; empty: the protocol's, and the best at hand.")
    ] = "",
    real: Annotated[str | None, typer.Option(help="Real images or their statistics, of the first features.")] = None,
    against: Annotated[str | None, typer.Option(help="Row that differences are to (default: the first row).")] = None,
    clip: Clip = None,
    lpips: Lpips = False,
    batch_size: BatchSize = None,
) -> None:
    """Compare pipelines with full precision on equal seeds: Markdown, JSON, CSV, manifest."""
    from quantdm.cli.rows import Asked, make_table

    asked = Asked(
        reference, tuple(rows), out, images, numbers(seeds), steps, protocol, features, real, against, clip, lpips,
        batch_size,
    )  # fmt: skip
    typer.echo(make_table(asked))
