"""From noises to numbers: draw samples of a pipeline, compare them with full precision and with real images."""

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from quantdm.errors import QuantDMError
from quantdm.files import load_tensors, save_tensors
from quantdm.metrics import batched, frechet_distance, load_extractor, psnr
from quantdm.metrics.classifier import load_digit_classifier
from quantdm.metrics.features import Extractor
from quantdm.pipelines.embedded.digits import load_digit_images
from quantdm.pipelines.generate import generate, memoized_text_encoders
from quantdm.pipelines.loading import DiffusionPipeline
from quantdm.pipelines.protocol import Protocol


@dataclass(frozen=True)
class Draw:
    """Which initial noises are used: image i of a draw has seed `base_seed * 10**6 + i`."""

    base_seed: int
    images: int
    steps: int

    @property
    def seeds(self) -> range:
        """One seed per image."""
        return range(self.base_seed * 10**6, self.base_seed * 10**6 + self.images)


@dataclass(frozen=True)
class Samples:
    """Images as a user gets them (uint8 [N, 3, H, W]) and their features (float32 [N, F])."""

    images: torch.Tensor
    features: torch.Tensor
    seconds: float  # of generating

    def save(self, path: str | Path) -> None:
        """Write both tensors to one safetensors file."""
        save_tensors(path, {"images": self.images, "features": self.features}, {"seconds": self.seconds})

    @classmethod
    def load(cls, path: str | Path) -> "Samples":
        """Read samples written by `save`."""
        tensors, metadata = load_tensors(path)
        return cls(tensors["images"], tensors["features"], metadata["seconds"])


def draw_samples(
    pipe: DiffusionPipeline, protocol: Protocol, extractor: Extractor, draw: Draw, *, batch_size: int = 250
) -> Samples:
    """Generate one image per seed of the draw and extract its features."""
    start = time.monotonic()
    with memoized_text_encoders(pipe):
        images = generate(pipe, protocol, draw.seeds, steps=draw.steps, batch_size=batch_size)
    seconds = time.monotonic() - start
    rounded = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return Samples(rounded, batched(extractor, rounded.float() / 255), seconds)


def compare(samples: Samples, reference: Samples) -> dict[str, float | None]:
    """Compare samples with the full-precision samples of the same noises.

    Returns:
        fid_fp: Frechet distance of the features. psnr_fp: dB over all paired 8-bit images (None when equal).
    """
    if samples.images.shape != reference.images.shape:
        raise QuantDMError(
            f"samples: got {tuple(samples.images.shape)} against a reference {tuple(reference.images.shape)}; "
            "both must come from the same draw"
        )
    paired = psnr(samples.images.float() / 255, reference.images.float() / 255)
    return {
        "fid_fp": frechet_distance(samples.features, reference.features),
        "psnr_fp": None if paired == float("inf") else paired,
    }


def compare_real(samples: Samples, protocol: Protocol) -> dict[str, float]:
    """Compare samples with real images where the protocol names some.

    Returns:
        fid_real: Frechet distance to the real test images. agreement: share of images that the classifier takes for
        the digit that was asked for. Empty if the protocol names no real images.
    """
    if protocol.real is None:
        return {}
    asked = torch.arange(len(samples.images)) % len(protocol.values)
    classifier = load_digit_classifier()
    said = batched(lambda x: classifier(x).argmax(1), samples.images.float() / 255)
    return {
        "fid_real": frechet_distance(samples.features, _real_features(protocol.features)),
        "agreement": (said == asked).float().mean().item(),
    }


@cache
def _real_features(extractor_name: str) -> torch.Tensor:
    return batched(load_extractor(extractor_name), load_digit_images("test")[0])


def real_floor(protocol: Protocol) -> float:
    """Return the Frechet distance of the real training digits to the real test digits."""
    train = batched(load_extractor(protocol.features), load_digit_images("train")[0])
    return frechet_distance(train, _real_features(protocol.features))
