"""From noises to numbers: draw samples of a pipeline, compare them with full precision and with real images."""

import time
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from quantdm.errors import QuantDMError, counted, told
from quantdm.files import load_tensors, save_tensors
from quantdm.metrics import batched, frechet_distance, load_extractor
from quantdm.metrics.classifier import load_digit_classifier
from quantdm.metrics.distance import check_features, psnr_of_bytes
from quantdm.metrics.features import Extractor
from quantdm.metrics.videos import by_frame, flicker, frechet_of_clips
from quantdm.pipelines.embedded.digits import digit_of, load_digit_images
from quantdm.pipelines.generate import Generated, as_pictures, generate_batches
from quantdm.pipelines.inputs import open_picture, pictures_in
from quantdm.pipelines.loading import DiffusionPipeline
from quantdm.pipelines.protocol import Protocol
from quantdm.pipelines.text_memory import memoized_text_encoders

DIGITS = "digits"  # the real images that are built in


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
    """Images as a user gets them (uint8 [N, C, H, W]), their features (float32 [N, F]) and flags (bool [N]).

    Videos are their frames, one after another; latents are grey pictures, one channel below the other.
    """

    images: torch.Tensor
    features: torch.Tensor
    seconds: float  # of generating
    flagged: torch.Tensor  # by the pipeline's safety checker, which hands out black images instead
    frames: int = 1  # of each video

    @cached_property
    def constant(self) -> torch.Tensor:
        """Which images have one colour only, though no safety checker flagged them, bool [N]."""
        pixels = self.images.flatten(2)
        return (pixels.amax(2) == pixels.amin(2)).all(1) & ~self.flagged

    def save(self, path: str | Path) -> None:
        """Write the tensors to one safetensors file."""
        tensors = {"images": self.images, "features": self.features, "flagged": self.flagged}
        save_tensors(path, tensors, {"seconds": self.seconds, "frames": self.frames})

    @classmethod
    def load(cls, path: str | Path) -> "Samples":
        """Read samples written by `save`.

        Raises:
            QuantDMError: damaged, or written before it was recorded what a safety checker flagged.
        """
        tensors, metadata = load_tensors(path)
        if "flagged" not in tensors:
            raise QuantDMError(f"{path}: does not say which images were flagged; move it away and run the stage again")
        found = tensors["images"], tensors["features"], metadata["seconds"], tensors["flagged"]
        return cls(*found, frames=metadata.get("frames", 1))


def draw_samples(
    pipe: DiffusionPipeline,
    protocol: Protocol,
    extractor: Extractor,
    draw: Draw,
    *,
    batch_size: int | Literal["auto"] = "auto",
    what: str = "the pipeline",
    may_be_constant: bool = False,
) -> Samples:
    """Generate one image (or video) per seed of the draw; of every batch only bytes and features are kept.

    Args:
        pipe: the pipeline.
        protocol: what is asked for.
        extractor: of the features.
        draw: the noises.
        batch_size: images at once at most ("auto": found from memory).
        what: what makes the images, for errors.
        may_be_constant: whether images of one colour only are a result: of a configuration that is compared with sound
            images they are, and it is far from them.

    Raises:
        QuantDMError: NaN or infinite pixels or features, or no image that shows anything; says of what and which draw.
    """
    with told(f"draw {draw.base_seed} ({counted(draw.images, 'image')}, {counted(draw.steps, 'step')}) of {what}"):
        kept, seconds, mark = [], 0.0, time.monotonic()
        with memoized_text_encoders(pipe):
            for found in generate_batches(pipe, protocol, draw.seeds, steps=draw.steps, batch_size=batch_size):
                seconds += time.monotonic() - mark
                kept.append(_reduced(found, protocol, extractor))
                mark = time.monotonic()
        images, features, flagged = (torch.cat(parts) for parts in zip(*kept, strict=True))
        samples = Samples(images, features, seconds, flagged, frames=len(images) // draw.images)
        check_features(samples.features)
        blank = samples.flagged if may_be_constant else samples.flagged | samples.constant
        if blank.all():
            raise QuantDMError(
                f"images: the safety checker flagged {int(samples.flagged.sum())} of {len(blank)} and "
                f"{int(samples.constant.sum())} have one colour only; expected some that show something. Load the "
                "pipeline with safety_checker=None, ask for other prompts, or load it in float32"
            )
    return samples


def _reduced(
    found: Generated, protocol: Protocol, extractor: Extractor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return bytes, features and flags of one batch, of videos those of every frame."""
    pictures = as_pictures(found.images, protocol)
    latents = protocol.output == "latent"
    features = batched(extractor, found.images if latents else pictures)
    return pictures, features, found.flagged.repeat_interleave(len(pictures) // len(found.images))


def compare(samples: Samples, reference: Samples) -> dict[str, float | None]:
    """Compare samples with the full-precision samples of the same noises.

    Returns:
        fid_fp: Frechet distance of the features. psnr_fp: dB over all paired 8-bit images (None when equal). Of videos
        these are of all frames, and beside them are fvd_fp (see `frechet_of_clips`), psnr_first_fp and psnr_last_fp, of
        the first and the last frames alone, and flicker_fp, the change from frame to frame over that of the reference.
        flagged, constant: pairs of which at least one image was flagged, or else has one colour only: they tell nothing
        of the quantization, and where both are such, they are equal.
    """
    if samples.images.shape != reference.images.shape:
        raise QuantDMError(
            f"samples: got {tuple(samples.images.shape)} against a reference {tuple(reference.images.shape)}; "
            "both must come from the same draw"
        )
    paired = psnr_of_bytes(samples.images, reference.images)
    return {
        "fid_fp": frechet_distance(samples.features, reference.features),
        "psnr_fp": None if paired == float("inf") else paired,
        **(_compare_videos(samples, reference) if samples.frames > 1 else {}),
        **count_blank(samples, reference),
    }


def _compare_videos(samples: Samples, reference: Samples) -> dict[str, float | None]:
    frames = samples.frames
    psnr, still = by_frame(samples.images, reference.images, frames), flicker(reference.images, frames)
    return {
        "fvd_fp": frechet_of_clips(samples.features, reference.features, frames),
        "psnr_first_fp": None if psnr[0] == float("inf") else psnr[0],
        "psnr_last_fp": None if psnr[-1] == float("inf") else psnr[-1],
        "flicker_fp": flicker(samples.images, frames) / still if still else None,
    }


def count_blank(*sets: Samples) -> dict[str, int]:
    """Return how many images of equal noise were flagged in any of the sets, and how many else have one colour only."""
    flagged = torch.stack([samples.flagged for samples in sets]).any(0)
    constant = torch.stack([samples.constant for samples in sets]).any(0) & ~flagged
    return {"flagged": int(flagged.sum()), "constant": int(constant.sum())}


def compare_real(samples: Samples, protocol: Protocol) -> dict[str, float]:
    """Compare samples with real images where the protocol names some.

    Returns:
        fid_real: Frechet distance to the real images: the test digits, or the pictures of a folder, scaled and cropped
        to the size of the samples. agreement: share of images that the classifier takes for the digit that was asked
        for; absent where the real images are no digits, or a condition names none. Empty if the protocol names no real
        images.
    """
    if protocol.real is None:
        return {}
    height, width = samples.images.shape[-2:]
    real = real_features(protocol.features, protocol.real, (width, height))
    figures = {"fid_real": frechet_distance(samples.features, real)}
    digits = [digit_of(value) if isinstance(value, (str, int)) else None for value in protocol.conditions]
    if protocol.real == DIGITS and digits and None not in digits:
        asked = torch.tensor([digits[i // samples.frames % len(digits)] for i in range(len(samples.images))])
        classifier = load_digit_classifier()
        said = batched(lambda x: classifier(x).argmax(1), samples.images)
        figures["agreement"] = (said == asked).float().mean().item()
    return figures


@cache
def real_features(extractor_name: str, real: str, size: tuple[int, int] | None) -> torch.Tensor:
    """Return the features of the real images; a folder's pictures at `size`, None: that of the first of them."""
    extractor = load_extractor(extractor_name)
    if real == DIGITS:
        return batched(extractor, load_digit_images("test")[0])
    found = []
    for path in pictures_in(Path(real)):
        picture = open_picture(path, size)
        size = size or picture.size
        if picture.size != size:
            picture = open_picture(path, size)
        found.append(extractor(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255))
    return torch.cat(found)


def real_floor(protocol: Protocol) -> float | None:
    """Return the Frechet distance of real images to real images: training to test digits, or two halves of a folder.

    None: the folder's halves would have one picture, which has no distance to others.
    """
    assert protocol.real is not None
    if protocol.real == DIGITS:
        train = batched(load_extractor(protocol.features), load_digit_images("train")[0])
        return frechet_distance(train, real_features(protocol.features, DIGITS, None))
    side = protocol.resolution
    features = real_features(protocol.features, protocol.real, None if side is None else (side, side))
    if len(features) < 4:
        return None
    return frechet_distance(features[::2], features[1::2])
