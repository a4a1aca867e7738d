"""The metrics that a protocol asks for by name, beside fid_fp and psnr_fp: of samples that are in memory."""

from collections.abc import Sequence
from pathlib import Path

import torch

from quantdm.errors import QuantDMError
from quantdm.metrics.feature_sets import FeatureSet
from quantdm.metrics.features import KINDS, FeatureSpace, open_features
from quantdm.metrics.images import ImageSet
from quantdm.metrics.measure import set_figures
from quantdm.metrics.moments import Moments
from quantdm.metrics.one_by_one import classes_of, inception_score, values_of_each
from quantdm.metrics.registry import METRICS, Need, check_enough, check_metrics
from quantdm.metrics.samples import DIGITS, Samples, real_features
from quantdm.pipelines.inputs import pictures_in
from quantdm.pipelines.protocol import Protocol

ALWAYS = {"fd": "fid_fp, and fid_real where there are real images", "psnr": "psnr_fp", "fvd": "fvd_fp of videos"}
CLIP = "clip:"
SCORED = ("digits", "efficientnet-lite0", "inception")  # beginnings of the features that have class scores


def check_chosen(protocol: Protocol) -> None:
    """Check, before anything is computed, that the metrics of a protocol can be computed in a run.

    Raises:
        QuantDMError: unknown, always there, or what it needs is not; says what.
    """
    if not protocol.metrics:
        return
    if protocol.output == "latent":
        raise QuantDMError("metrics: are of images, and the protocol makes latents; leave metrics or output out")
    for name in protocol.metrics:
        if name in ALWAYS:
            raise QuantDMError(f"metrics: {name}: is always there, as {ALWAYS[name]}; leave it out")
    have: set[Need] = {"images", "set", "pairs", "features kept"}
    if protocol.features.startswith(CLIP):
        have |= {"CLIP features", "prompts"} if _words(protocol) else {"CLIP features"}
    have |= {"captions"} if _words(protocol) else set()
    if protocol.features.startswith(SCORED):
        have.add("class scores")
        if any("classes" in METRICS[name].needs for name in protocol.metrics if name in METRICS):
            have |= {"classes"} if classes_of(_words(protocol), open_features(protocol.features)) is not None else set()
    check_metrics(protocol.metrics, have)


def check_counts(protocol: Protocol, images: int) -> None:
    """Check, before anything is computed, that there are as many images as the metrics of a protocol need.

    Args:
        protocol: with metrics that exist.
        images: of a draw: those that are judged, and those of full precision beside them.

    Raises:
        QuantDMError: too few, or too few real ones.
    """
    others = {"images of full precision": images}
    if protocol.real not in (None, DIGITS):
        others["real images"] = len(pictures_in(Path(protocol.real)))
    check_enough(protocol.metrics, images, others)


def chosen_figures(samples: Samples, reference: Samples | None, protocol: Protocol) -> dict[str, float]:
    """Return the figures that a protocol asks for by name.

    Against the full-precision samples of the same noises they are called NAME_fp, against its real images NAME_real;
    those without a reference have their own name.
    """
    if not protocol.metrics:
        return {}
    space = open_features(protocol.features)
    sets = [name for name in protocol.metrics if "set" in METRICS[name].needs]
    each = [name for name in protocol.metrics if name not in sets and ("pairs" not in METRICS[name].needs or reference)]
    found: dict[str, float] = {}
    mine = _set_of(samples.features, space)
    if sets and reference is not None:
        figures = set_figures(sets, mine, _set_of(reference.features, space), paired=True)
        found |= {f"{name}_fp": figures[name].value for name in sets}
    if sets and protocol.real is not None:
        height, width = samples.images.shape[-2:]
        real = real_features(protocol.features, protocol.real, (width, height))
        figures = set_figures(sets, mine, _set_of(real, space))
        found |= {f"{name}_real": figures[name].value for name in sets}
    return found | _each(each, samples, reference, protocol, space)


def _each(
    names: Sequence[str], samples: Samples, reference: Samples | None, protocol: Protocol, space: FeatureSpace
) -> dict[str, float]:
    """Return the means of what has one value per image."""
    if not names:
        return {}
    words, count = _words(protocol), len(samples.images)
    prompts = None if words is None else [words[i // samples.frames % len(words)] for i in range(count)]
    values = values_of_each(
        names,
        _images_of(samples, "the samples"),
        space,
        pairs=None if reference is None else _images_of(reference, "full precision"),
        prompts=prompts,
        clip=protocol.features.removeprefix(CLIP) if protocol.features.startswith(CLIP) else None,
    )
    return {
        f"{name}_fp" if "pairs" in METRICS[name].needs else name: (
            inception_score(values[name]) if name == "inception_score" else values[name].mean().item()
        )
        for name in names
    }


def _words(protocol: Protocol) -> tuple[str, ...] | None:
    """Return what images are asked to show, as text, in turn."""
    return tuple(str(value) for value in protocol.conditions) or None


def _images_of(samples: Samples, source: str) -> ImageSet:
    names = tuple(f"{i:06d}" for i in range(len(samples.images)))
    return ImageSet(source, names, lambda: iter(samples.images.split(250)), lambda: source)


def _set_of(features: torch.Tensor, space: FeatureSpace) -> FeatureSet:
    moments = Moments.of(features, ruler=space.ruler, source="samples")
    return FeatureSet(moments, features, space.name, KINDS[space.name.partition(":")[0]].distance)
