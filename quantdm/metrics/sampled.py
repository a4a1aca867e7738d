"""A pipeline as a set of images: made when they are asked for, known by what they depend on."""

from collections.abc import Iterator
from typing import Literal

import torch

from quantdm.errors import QuantDMError, told
from quantdm.files import digest
from quantdm.metrics.door import check_measures
from quantdm.metrics.images import ImageSet, framed
from quantdm.metrics.samples import Draw
from quantdm.metrics.to_folder import manifest_of
from quantdm.metrics.videos import are_videos
from quantdm.pipelines.generate import as_pictures, generate_batches
from quantdm.pipelines.loading import DiffusionPipeline
from quantdm.pipelines.protocol import Protocol
from quantdm.pipelines.signature import CallSignature, output_of
from quantdm.pipelines.text_memory import memoized_text_encoders

FRAME_COUNTS = ("num_frames", "video_length")  # what pipelines call the number of frames


def sampled_images(
    pipe: DiffusionPipeline, protocol: Protocol, draw: Draw, *, name: str, batch_size: int | Literal["auto"] = "auto"
) -> ImageSet:
    """Return the images of a draw as a set; nothing is made yet, and of a set in the cache nothing ever is.

    Raises:
        QuantDMError: fewer than two images, or the pipeline cannot make them.
    """
    if draw.images < 2:
        raise QuantDMError(f"images: got {draw.images}, expected two or more: one has no distance to others")
    check_measures(pipe, protocol)
    manifest, frames = manifest_of(pipe, protocol, draw.seeds, draw.steps), frames_of(pipe, protocol)

    def batches() -> Iterator[torch.Tensor]:
        with told(f"draw {draw.base_seed} of {name}"), memoized_text_encoders(pipe):
            for found in generate_batches(
                pipe, protocol, draw.seeds, steps=draw.steps, batch_size=batch_size, lots=True
            ):
                if are_videos(found.images, protocol) and found.images.shape[1] != frames:
                    raise QuantDMError(
                        f"videos: got {found.images.shape[1]} frames, expected {frames}; give num_frames in call as "
                        "the pipeline makes them"
                    )
                yield as_pictures(found.images, protocol)

    names = tuple(f"{i:06d}" for i in range(draw.images))
    prompts = manifest["prompts"]
    found = ImageSet(
        name, names, batches, lambda: digest(manifest["identity"], manifest["versions"]), draw.steps,
        manifest["seeds"], None if prompts is None else tuple(prompts),
    )  # fmt: skip
    return found if frames == 1 else framed(found, frames)


def frames_of(pipe: DiffusionPipeline, protocol: Protocol) -> int:
    """Return how many frames each video has by the protocol, else by the pipeline's default; 1 for images.

    Raises:
        QuantDMError: neither says it.
    """
    signature = CallSignature.of(pipe)
    if output_of(signature, protocol) != "video":
        return 1
    found = _frame_count(signature, protocol)
    if found is None:
        raise QuantDMError(f"{signature.kind}: how many frames its videos have is not known; give num_frames in call")
    return found[1]


def first_made(pipe: DiffusionPipeline, protocol: Protocol) -> str:
    """Return in words what the first call makes; of a video with how many frames, and how to have fewer."""
    signature = CallSignature.of(pipe)
    if output_of(signature, protocol) != "video":
        return "the first image"
    found = _frame_count(signature, protocol)
    if found is None:
        return "the first video"
    name, frames = found
    left = "" if name in protocol.of_image(0) else f" ({name} in the protocol's `call` asks for fewer)"
    return f"the first video, {frames} frames{left}"


def _frame_count(signature: CallSignature, protocol: Protocol) -> tuple[str, int] | None:
    """Return what the call names its frames, and how many: the protocol's, else the default; None: nobody says."""
    given = ((name, protocol.of_image(0).get(name, signature.parameters[name].default)) for name in signature.names
             if name in FRAME_COUNTS)  # fmt: skip
    name, frames = next(given, ("", None))
    return (name, frames) if isinstance(frames, int) else None
