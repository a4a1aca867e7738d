"""Measure a set of images: every figure that was asked for, against a set, in pairs, with prompts, or alone."""

from collections.abc import Sequence

import torch

from quantdm.errors import QuantDMError
from quantdm.metrics.distance import frechet_of_moments
from quantdm.metrics.feature_sets import ENOUGH, FeatureSet, check_same_size, feature_set
from quantdm.metrics.features import FeatureSpace
from quantdm.metrics.figures import Figure
from quantdm.metrics.images import ImageSet
from quantdm.metrics.intervals import frechet_infinity
from quantdm.metrics.kernels import cmmd, kid
from quantdm.metrics.neighbours import neighbour_figures
from quantdm.metrics.one_by_one import classes_of, inception_score, values_of_each
from quantdm.metrics.registry import METRICS, Need, check_enough, check_metrics
from quantdm.metrics.videos import frechet_of_clips

Reference = ImageSet | FeatureSet


def measure(
    made: ImageSet,
    space: FeatureSpace,
    metrics: Sequence[str],
    *,
    reference: Reference | None = None,
    pairs: ImageSet | None = None,
    prompts: Sequence[str] | None = None,
    clip: str | None = None,
    cached: bool = True,
) -> list[Figure]:
    """Return the figures of a set of images, in the order in which they were asked for.

    A Frechet distance of fewer than 2,048 images, or of fewer images than features, says so and brings KID along.

    Args:
        made: the images that are judged.
        space: features of all figures that need some.
        metrics: names in the registry.
        reference: images, or their statistics, that the distribution is compared with.
        pairs: images of the same noises, in the same order.
        prompts: one per image (None: those that the images came with).
        clip: a CLIP model for clip_score.
        cached: keep features in the user's cache.

    Raises:
        QuantDMError: an unknown metric, something that it needs is missing (says how to get it), statistics of other
            features or resizes, pairs that do not match, or images that cannot be read.
    """
    asked = tuple(prompts) if prompts is not None else made.prompts
    have = _have(space, reference, pairs, asked, clip)
    if made.frames > 1 and isinstance(reference, ImageSet) and reference.frames == made.frames:
        have.add("videos")
    check_metrics(tuple(metrics), have)
    others = {} if reference is None else {f"images of {_name_of(reference)}": _count_of(reference)}
    check_enough(metrics, len(made), others)
    sets = [name for name in metrics if "set" in METRICS[name].needs]
    each = [name for name in metrics if {"pairs", "prompts", "captions", "class scores"} & set(METRICS[name].needs)]
    found: dict[str, Figure] = {}
    if sets:
        assert reference is not None
        keep = any("features kept" in METRICS[name].needs for name in sets)
        mine = feature_set(made, space, keep=keep, cached=cached)
        other = (
            reference
            if isinstance(reference, FeatureSet)
            else feature_set(reference, space, keep=keep or len(made) < ENOUGH, cached=cached)
        )
        found |= set_figures(sets, mine, other, paired=pairs is not None, frames=made.frames)
    if each:
        found |= _each_figures(each, made, space, pairs, asked, clip)
    order = [*metrics, *(name for name in found if name not in metrics)]
    return [found[name] for name in order]


def _name_of(reference: Reference) -> str:
    return reference.moments.source if isinstance(reference, FeatureSet) else reference.source


def _count_of(reference: Reference) -> int:
    return reference.moments.n if isinstance(reference, FeatureSet) else len(reference)


def _have(
    space: FeatureSpace,
    reference: Reference | None,
    pairs: ImageSet | None,
    prompts: Sequence[str] | None,
    clip: str | None,
) -> set[Need]:
    have: set[Need] = {"images"}
    if reference is not None:
        have.add("set")
    if reference is not None and not (isinstance(reference, FeatureSet) and reference.features is None):
        have.add("features kept")
    if pairs is not None:
        have.add("pairs")
    if prompts is not None:
        have |= {"captions"} if clip is None else {"captions", "prompts"}
    if space.logits is not None:
        have.add("class scores")
    if classes_of(prompts, space) is not None:
        have.add("classes")
    if space.name.startswith("clip:"):
        have.add("CLIP features")
    return have


# -------------------------------------------------------------------------------------------------- against other sets


def set_figures(
    names: Sequence[str], mine: FeatureSet, other: FeatureSet, *, paired: bool = False, frames: int = 1
) -> dict[str, Figure]:
    """Return the figures that compare two sets of features; KID is added where a Frechet distance is of few images.

    Raises:
        QuantDMError: statistics of different features or resizes, or too few images.
    """
    check_same_size(mine, other)
    found: dict[str, Figure] = {}
    x, y = mine.features, other.features
    near: dict[str, float] = {}
    for name in names:
        notes: tuple[str, ...] = ()
        if name == "fd":
            value, notes = frechet_of_moments(mine.moments, other.moments), doubts(mine, other)
        elif name == "fd_infinity":
            value, error = frechet_infinity(_kept(x), other.moments)
            notes = (f"by a line in 1/N, standard error {error:.3f}",)
        elif name == "kid":
            value, error = kid(_kept(x), _kept(y), paired=paired)
            notes = () if error is None else (f"mean of 100 subsets of 1,000, standard error {error:.1e}",)
        elif name == "fvd":
            value = frechet_of_clips(_kept(x), _kept(y), frames)
            notes = (f"{mine.moments.n // frames:,} videos of {frames} frames; features of frames, not I3D's",)
        elif name == "cmmd":
            value = cmmd(_kept(x), _kept(y))
        else:
            near = near or neighbour_figures(_kept(x), _kept(y))
            value = near[name]
        found[name] = _of_sets(name, value, mine, other, notes)
    if "fd" in found and found["fd"].notes and "kid" not in found and x is not None and y is not None:
        found |= set_figures(["kid"], mine, other, paired=paired)
    return found


def doubts(mine: FeatureSet, other: FeatureSet) -> tuple[str, ...]:
    """Return what is to be said of a Frechet distance of these sets: too few images, statistics that tell little."""
    n, width = min(mine.moments.n, other.moments.n), len(mine.moments.total)
    found = []
    if n < ENOUGH or n <= width:
        singular = f"; {n:,} images give {width:,} features a singular covariance" if n <= width else ""
        found.append(f"biased upwards: of fewer than {max(ENOUGH, width + 1):,} images{singular}. Look at KID")
    for each in (mine, other):
        if each.constant:
            found.append(f"{each.constant} of {each.moments.n:,} images of {each.moments.source} have one colour only")
        if not each.moments.ruler:
            found.append(f"{each.moments.source} does not say its features, resizing and number of images")
    return tuple(found)


def _kept(features: torch.Tensor | None) -> torch.Tensor:
    if features is None:
        raise QuantDMError("statistics: hold sums only; make them with --keep-features, or give the images")
    return features


def _of_sets(name: str, value: float, mine: FeatureSet, other: FeatureSet, notes: tuple[str, ...]) -> Figure:
    known = METRICS[name]
    short = mine.distance.removeprefix("FD-")
    return Figure(
        name, known.title.format(distance=mine.distance, features=short), value, known.better, mine.moments.n,
        other.moments.n if other.moments.ruler else None, mine.steps, mine.seeds, len(mine.moments.total), mine.resize,
        mine.moments.ruler, known.digits, notes=notes,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ image by image


def _each_figures(
    names: Sequence[str],
    made: ImageSet,
    space: FeatureSpace,
    pairs: ImageSet | None,
    prompts: Sequence[str] | None,
    clip: str | None,
) -> dict[str, Figure]:
    values = values_of_each(names, made, space, pairs=pairs, prompts=prompts, clip=clip)
    found = {}
    for name in names:
        known, own = METRICS[name], values[name]
        value = inception_score(own) if name == "inception_score" else own.mean().item()
        of_features = name in ("cosine", "inception_score", "agreement")
        resize = "; ".join(part for part in (made.resized, space.kind.resize if of_features else "") if part)
        equal = int((own >= 100).sum()) if name == "psnr" else 0
        found[name] = Figure(
            name, known.title.format(features=space.kind.distance.removeprefix("FD-")), value, known.better, len(made),
            None, made.steps, made.seeds, None, resize, space.ruler if of_features else "", known.digits,
            notes=(f"{equal} pairs are equal and count as 100 dB",) if equal else (),
        )  # fmt: skip
    return found
