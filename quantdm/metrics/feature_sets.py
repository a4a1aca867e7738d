"""The features of a set of images: sums, and the features themselves where they are needed; on disk, in a cache."""

import os
import zipfile
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from quantdm.errors import QuantDMError
from quantdm.files import digest, load_tensors, save_tensors
from quantdm.metrics.features import FeatureSpace, batched
from quantdm.metrics.images import SCALED, ImageSet
from quantdm.metrics.kept import KeptFeatures
from quantdm.metrics.moments import Moments
from quantdm.progress import bar

KIND = "feature statistics"
ENOUGH = 2048  # images, from where on the bias of a Frechet distance is small against what is compared


@dataclass(frozen=True)
class FeatureSet:
    """Features of images with what a figure of them has to say."""

    moments: Moments
    features: torch.Tensor | None = None  # float32 [N, F], memory-mapped
    name: str = ""  # of the features, as asked for
    distance: str = "FD"  # what their Frechet distance is called
    resize: str = ""  # what the extractor does, and what was done before
    steps: int | None = None
    seeds: str | None = None
    constant: int = 0  # images of one colour only: black ones of a safety checker look equal to each other

    def __add__(self, other: "FeatureSet") -> "FeatureSet":
        """Return the union of two sets, e.g. of what two processes made.

        Raises:
            QuantDMError: they are of different features or resizes.
        """
        moments = self.moments + other.moments
        both = self.features is not None and other.features is not None
        kept = torch.cat([self.features, other.features]) if both else None  # pyright: ignore[reportArgumentType]
        seeds = " + ".join(dict.fromkeys(s for s in (self.seeds, other.seeds) if s)) or None
        steps = self.steps if self.steps == other.steps else None
        constant = self.constant + other.constant
        return replace(self, moments=moments, features=kept, seeds=seeds, steps=steps, constant=constant)

    def save(self, path: str | Path) -> None:
        """Write sums, features if there are any, and what they are of to one safetensors file."""
        m = self.moments
        tensors = {"total": m.total, "outer": m.outer} | ({} if self.features is None else {"features": self.features})
        told = {key: getattr(self, key) for key in ("name", "distance", "resize", "steps", "seeds", "constant")}
        save_tensors(path, tensors, {"kind": KIND, "n": m.n, "ruler": m.ruler, "source": m.source, **told})

    @classmethod
    def load(cls, path: str | Path) -> "FeatureSet":
        """Read what `save` wrote, or an .npz with `mu` and `sigma` as pytorch-fid writes it.

        Raises:
            QuantDMError: missing, damaged, or something else.
        """
        if str(path).endswith(".npz"):
            return cls(_published(Path(path)))
        tensors, header = load_tensors(path)
        if header.get("kind") != KIND:
            raise QuantDMError(f"{path}: holds no feature statistics; make some with `quantdm evaluate fid ref`")
        moments = Moments(header["n"], tensors["total"], tensors["outer"], header["ruler"], str(path))
        told = {key: header[key] for key in ("name", "distance", "resize", "steps", "seeds", "constant")}
        return cls(moments, tensors.get("features"), **told)


def is_statistics(path: str | Path) -> bool:
    """Tell whether a file holds statistics and not images."""
    path = Path(path)
    if not path.is_file():
        return False
    if path.suffix.lower() == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                return {"mu", "sigma"} <= set(file.files)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return False  # whoever opens it as images says what is wrong
    return path.suffix.lower() == ".safetensors" and load_tensors(path)[1].get("kind") == KIND


def _published(path: Path) -> Moments:
    """Return published statistics: they say neither how many images nor which resizing they are of."""
    with np.load(path, allow_pickle=False) as file:
        mean, covariance = (torch.from_numpy(np.asarray(file[key], dtype=np.float64)) for key in ("mu", "sigma"))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise QuantDMError(
            f"{path}: mu is {tuple(mean.shape)} and sigma {tuple(covariance.shape)}, expected [F] and [F, F]"
        )
    n = 10**9  # of so many images that n and n - 1 are the same
    return Moments(n, mean * n, covariance * (n - 1) + torch.outer(mean, mean) * n, "", str(path))


def feature_set(images: ImageSet, space: FeatureSpace, *, keep: bool = False, cached: bool = True) -> FeatureSet:
    """Return the features of images: from the cache where they were computed before, by content.

    Args:
        images: the images.
        space: what features.
        keep: keep the features themselves, too: kernel distances and neighbours need them. They are kept in any case
            for fewer than 2,048 images.
        cached: look into the cache, and write to it.

    Raises:
        QuantDMError: an image cannot be read, or a feature is NaN or infinite.
    """
    keep = keep or len(images) < ENOUGH
    resize = "; ".join(part for part in (images.resized, space.kind.resize) if part)
    told = {"name": space.name, "distance": space.kind.distance, "resize": resize}
    place = cache_folder() / f"{digest(images.digest(), space.ruler, images.resized)}.safetensors" if cached else None
    if place is not None and place.is_file():
        found = FeatureSet.load(place)
        if found.features is not None or not keep:
            moments = replace(found.moments, source=images.source)
            return replace(found, moments=moments, steps=images.steps, seeds=images.seeds)
    moments, constant, features = None, 0, None
    with (
        KeptFeatures(None if place is None else place.parent) if keep else nullcontext() as kept,
        bar(len(images), f"features of {Path(images.source).name}") as progress,
    ):
        for batch in images.batches():
            found = batched(space.extract, batch)
            some = Moments.of(found, ruler=space.ruler, source=images.source)
            moments = some if moments is None else moments + some
            if kept is not None:
                kept.add(found)
            pixels = batch.flatten(2)
            constant += int((pixels.amax(2) == pixels.amin(2)).all(1).sum())
            progress.update(len(batch))
        features = None if kept is None else kept.tensor()
    assert moments is not None
    found = FeatureSet(moments, features, **told, steps=images.steps, seeds=images.seeds, constant=constant)
    if place is None:
        return found
    found.save(place)  # what it read of the features stays in memory with them: the copy in the cache is read instead
    return found if features is None else replace(found, features=FeatureSet.load(place).features)


def check_same_size(mine: FeatureSet, other: FeatureSet) -> None:
    """Check that two sets of pictures that were both scaled before any features were scaled to one size.

    One that was not scaled says nothing: photographs are scaled to the size in which a pipeline makes images.

    Raises:
        QuantDMError: names both sources and both sizes.
    """
    first, second = (each.resize.partition("; ")[0] for each in (mine, other))
    if SCALED in first and SCALED in second and first != second:
        raise QuantDMError(
            f"{other.moments.source}: is of pictures {second}, but {mine.moments.source} {first}; expected one --side"
        )


def merged(sets: Iterable[FeatureSet]) -> FeatureSet:
    """Return the union of sets, e.g. of what several processes made."""
    first, *others = sets
    for each in others:
        first = first + each
    return first


def cache_folder() -> Path:
    """Return where statistics are kept: $QUANTDM_CACHE, else quantdm below the user's cache directory."""
    if own := os.environ.get("QUANTDM_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "quantdm" / "statistics"
