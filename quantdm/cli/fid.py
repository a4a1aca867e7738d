"""`quantdm evaluate fid`: reference statistics, a distance to them, and two sets of images side by side."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from quantdm.cli.app import AsJson, ProtocolFile
from quantdm.cli.evaluate import BatchSize, Clip, Steps, evaluate_app
from quantdm.errors import counted

fid_app = typer.Typer(
    no_args_is_help=True,
    help="Frechet and kernel distances of folders, archives, tensors and pipelines.",
    epilog="Example: quantdm evaluate fid calc images/quantized --ref coco.safetensors",
)
evaluate_app.add_typer(fid_app, name="fid")

Features = Annotated[
    str, typer.Option(help="inception-pytorch-fid[:PATH], efficientnet-lite0, dinov2:PATH, ... (empty: best at hand).")
]
Side = Annotated[int | None, typer.Option(min=1, help="Scale and crop every picture to SIDE x SIDE first.")]
Rgb = Annotated[bool, typer.Option("--rgb", help="Turn grey, palette and alpha pictures into RGB.")]
Keep = Annotated[bool, typer.Option("--keep-features", help="Keep features, for KID, precision, CMMD.")]
Count = Annotated[int, typer.Option(min=2, help="Images of a pipeline.")]
Seed = Annotated[int, typer.Option(min=0, help="Of a pipeline: image i has seed SEED * 1,000,000 + i.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Compute features anew, keep none.")]
Prompts = Annotated[Path | None, typer.Option(help="Text file, one prompt per image.")]
Metrics = Annotated[str, typer.Option(help="Names with commas between; `quantdm evaluate fid metrics` lists them.")]


@fid_app.command(epilog="Example: quantdm evaluate fid ref val2017.zip --side 512 --rgb -o coco.safetensors")
def ref(
    sources: Annotated[list[str], typer.Argument(help="Images or statistics; of several, the union.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Statistics, .safetensors.")],
    features: Features = "",
    side: Side = None,
    rgb: Rgb = False,
    keep_features: Keep = False,
    images: Count = 1000,
    seed: Seed = 101,
    steps: Steps = None,
    protocol: ProtocolFile = None,
    batch_size: BatchSize = None,
    no_cache: NoCache = False,
) -> None:
    """Compute the statistics of reference images once; of shards, merge them exactly."""
    from quantdm.cli.sources import How, statistics_of
    from quantdm.metrics.feature_sets import merged

    how = How(side, rgb, images, seed, steps, protocol, batch_size)
    found = merged(statistics_of(s, how, features, keep=keep_features, cached=not no_cache) for s in sources)
    found.save(out)
    typer.echo(f"statistics: {out} ({counted(found.moments.n, 'image')}, {found.moments.ruler})")


@fid_app.command(epilog="Example: quantdm evaluate fid calc digits-dit --images 2000 --ref digits.safetensors")
def calc(
    source: Annotated[str, typer.Argument(help="Images, or a pipeline that makes them.")],
    reference: Annotated[str, typer.Option("--ref", help="Statistics, or images.")],
    metrics: Metrics = "fd",
    features: Features = "",
    side: Side = None,
    rgb: Rgb = False,
    images: Count = 1000,
    seed: Seed = 101,
    steps: Steps = None,
    protocol: ProtocolFile = None,
    batch_size: BatchSize = None,
    clip: Clip = None,
    prompts: Prompts = None,
    as_json: AsJson = False,
    no_cache: NoCache = False,
) -> None:
    """Measure images against reference statistics: FID, and others by --metrics."""
    from quantdm.cli.sources import How, measured

    how = How(side, rgb, images, seed, steps, protocol, batch_size)
    found = measured(source, reference, how, features, metrics, cached=not no_cache, clip=clip, prompts=prompts)
    _show(found, as_json)


@fid_app.command(epilog="Example: quantdm evaluate fid compare images/quantized images/fp --features digits")
def compare(
    made: Annotated[str, typer.Argument(help="Images that are judged, or a pipeline.")],
    full: Annotated[str, typer.Argument(help="Images of equal seeds and names, or a pipeline.")],
    metrics: Metrics = "fd,kid,psnr,ssim,cosine",
    features: Features = "",
    side: Side = None,
    rgb: Rgb = False,
    images: Count = 1000,
    seed: Seed = 101,
    steps: Steps = None,
    protocol: ProtocolFile = None,
    batch_size: BatchSize = None,
    clip: Clip = None,
    prompts: Prompts = None,
    as_json: AsJson = False,
    no_cache: NoCache = False,
) -> None:
    """Compare two sets of images of equal seeds: distances and paired figures."""
    from quantdm.cli.sources import How, measured

    how = How(side, rgb, images, seed, steps, protocol, batch_size)
    found = measured(made, full, how, features, metrics, cached=not no_cache, pairs=True, clip=clip, prompts=prompts)
    _show(found, as_json)


@fid_app.command(epilog="Example: quantdm evaluate fid metrics")
def metrics() -> None:
    """List metrics and features: what they say, what they need, what is missing here."""
    from quantdm.cli.sources import listed

    typer.echo(listed())


def _show(figures: list[Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([figure.record() for figure in figures], indent=1))
    else:
        for figure in figures:
            typer.echo(str(figure))
