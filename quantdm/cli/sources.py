"""What `evaluate fid` does: a source is a pipeline, images on disk, or statistics of images."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from quantdm.errors import QuantDMError
from quantdm.machine import fast_dtype
from quantdm.metrics import lpips
from quantdm.metrics.feature_sets import FeatureSet, feature_set, is_statistics
from quantdm.metrics.features import KINDS, default_features, open_features
from quantdm.metrics.figures import Figure
from quantdm.metrics.images import ImageSet, open_images
from quantdm.metrics.measure import measure
from quantdm.metrics.registry import METRICS
from quantdm.pipelines.inputs import Lines, resolve
from quantdm.pipelines.known import known_pipelines


@dataclass(frozen=True)
class How:
    """How images are read, or made by a pipeline."""

    side: int | None
    rgb: bool
    images: int
    seed: int
    steps: int | None
    protocol: str | None
    batch_size: int | None


def is_pipeline(source: str) -> bool:
    """Tell whether a source is a pipeline: an embedded name, a folder with model_index.json, or OWNER/NAME."""
    if source in known_pipelines():
        return True
    if os.path.lexists(source):
        return (Path(source) / "model_index.json").is_file()
    return source.count("/") == 1 and "." not in source.partition("/")[0] and not Path(source).parent.exists()


def image_set(source: str, how: How) -> ImageSet:
    """Open a source as images.

    Raises:
        QuantDMError: it is neither a pipeline nor images.
    """
    if not is_pipeline(source):
        return open_images(source, side=how.side, rgb=how.rgb)
    from quantdm.cli.images import protocol_of  # imports diffusers, for which images on disk need not wait
    from quantdm.metrics.sampled import sampled_images
    from quantdm.metrics.samples import Draw
    from quantdm.pipelines.loading import load_pipeline

    pipe = load_pipeline(source, torch_dtype=getattr(torch, fast_dtype()))
    protocol = protocol_of(source, pipe, how.protocol)
    draw = Draw(how.seed, how.images, how.steps or protocol.steps)
    return sampled_images(pipe, protocol, draw, name=source, batch_size=how.batch_size or "auto")


def statistics_of(source: str, how: How, features: str, *, keep: bool, cached: bool) -> FeatureSet:
    """Return the statistics of a source; of statistics, these."""
    if is_statistics(source):
        return FeatureSet.load(source)
    return feature_set(image_set(source, how), open_features(features or default_features()), keep=keep, cached=cached)


def measured(
    source: str,
    reference: str,
    how: How,
    features: str,
    metrics: str,
    *,
    cached: bool,
    pairs: bool = False,
    clip: str | None = None,
    prompts: Path | None = None,
) -> list[Figure]:
    """Return the figures of a source against a reference; statistics say themselves what features they are of.

    Raises:
        QuantDMError: see `measure`.
    """
    known = FeatureSet.load(reference) if is_statistics(reference) else None
    if pairs and known is not None:
        raise QuantDMError(f"{reference}: holds statistics, expected images to compare in pairs; or use `fid calc`")
    space = open_features(features or (known.name if known is not None and known.name else default_features()))
    other = known or image_set(reference, how)
    asked = None if prompts is None else resolve(Lines(lines=str(prompts)))
    return measure(
        image_set(source, how), space, [name.strip() for name in metrics.split(",") if name.strip()], reference=other,
        pairs=other if pairs and isinstance(other, ImageSet) else None, prompts=asked, clip=clip, cached=cached,
    )  # fmt: skip


def listed() -> str:
    """Return what there is to measure with, one line each, and what is missing here with the command that gets it."""
    lines = ["metrics (better; what they say):"]
    for name, metric in METRICS.items():
        needs = ", ".join(metric.needs)
        lines.append(f"  {name:<16} {metric.better:<7} {metric.says} (needs: {needs})")
        missing = metric.package or (name == "lpips" and lpips.find_alexnet() is None)
        if missing:
            lines.append(f"  {'':<16} missing; to get it: {metric.fetch}")
    lines.append("features:")
    for name, kind in KINDS.items():
        lines.append(f"  {name:<24} {kind.distance}; resize: {kind.resize}; {kind.says}")
        if kind.path or (kind.find is not None and kind.find("") is None):
            lines.append(f"  {'':<24} {'needs a path' if kind.path else 'missing'}; to get it: {kind.fetch}")
    return "\n".join(lines)
