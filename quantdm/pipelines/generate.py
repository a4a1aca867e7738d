"""Generate images with one generator per image; record trajectories for calibration."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from quantdm.denoisers.calls import Call, record_calls
from quantdm.errors import QuantDMError
from quantdm.machine import seeded
from quantdm.pipelines.checks import check_generates, pixels_of
from quantdm.pipelines.parts import get_denoiser
from quantdm.pipelines.protocol import Protocol

# What pipelines call the list of the images that their safety checker blanked.
FLAGS = ("nsfw_content_detected", "nsfw_detected")


@dataclass(frozen=True)
class Generated:
    """Images [N, 3, H, W] in [0, 1], and which of them a safety checker flagged, bool [N]."""

    images: torch.Tensor
    flagged: torch.Tensor


def image_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one generator per image, so that an image depends on its seed and not on the batch around it."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def generate(
    pipe: DiffusionPipeline,
    protocol: Protocol,
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    first: int = 0,
    batch_size: int = 250,
    progress: Callable[[int], object] | None = None,
) -> torch.Tensor:
    """Generate one image per seed; image i shows condition `protocol.values[(first + i) % len]`.

    Args:
        pipe: any pipeline that takes `prompt` or `class_labels`, `generator`, `guidance_scale`, `num_inference_steps`.
        protocol: what is asked for, the guidance scale and the default number of steps.
        seeds: one per image. Schedulers that draw noise without a generator are seeded per batch, state restored.
        steps: number of denoising steps (None: the protocol's).
        first: index of the first image.
        progress: called with the number of images done after every batch.

    Returns:
        float32 images [N, C, H, W] in [0, 1] on the CPU, one channel (grey) or three.

    Raises:
        QuantDMError: `check_generates` refuses the pipeline, there are no seeds, what comes out are no images, or a
            pixel is NaN or infinite (names the seed).
    """
    return generate_flagged(
        pipe, protocol, seeds, steps=steps, first=first, batch_size=batch_size, progress=progress
    ).images


@torch.no_grad()
def generate_flagged(
    pipe: DiffusionPipeline,
    protocol: Protocol,
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    first: int = 0,
    batch_size: int = 250,
    progress: Callable[[int], object] | None = None,
) -> Generated:
    """Generate as `generate` does, and say which images a safety checker flagged (they come back black)."""
    check_generates(pipe, protocol)
    if not len(seeds):
        raise QuantDMError("images: got no seeds, expected one or more, one per image")
    accepted = inspect.signature(pipe.__call__).parameters
    images, flagged = [], []
    for start in range(0, len(seeds), batch_size):
        batch = list(seeds[start : start + batch_size])
        values = [protocol.values[(first + start + i) % len(protocol.values)] for i in range(len(batch))]
        settings: dict[str, Any] = {
            protocol.argument: values,
            "generator": image_generators(batch),
            "num_inference_steps": steps or protocol.steps,
            "guidance_scale": protocol.guidance_scale,
            "output_type": "np",
        }
        for side in ("height", "width"):
            if protocol.resolution is not None and side in accepted:
                settings[side] = protocol.resolution
        with seeded(batch[0], devices_of(pipe)):
            out: Any = pipe(**settings)  # pyright: ignore[reportCallIssue]
        images.append(pixels_of(pipe, out))
        flagged.append(_flags(out, len(batch)))
        check_pixels(images[-1], batch)
        if progress is not None:
            progress(len(batch))
    return Generated(torch.cat(images).contiguous(), torch.cat(flagged))


def _flags(out: Any, count: int) -> torch.Tensor:
    found = next((list(flags) for name in FLAGS if (flags := getattr(out, name, None)) is not None), [False] * count)
    return torch.tensor([bool(flag) for flag in found])


def check_pixels(images: torch.Tensor, seeds: Sequence[int]) -> None:
    """Check that images [N, ...] are numbers: as bytes, NaN would become black and black equals black.

    Raises:
        QuantDMError: says how many images are not, and the seed of the first.
    """
    bad = ~images.flatten(1).isfinite().all(dim=1)
    if bad.any():
        raise QuantDMError(
            f"images: NaN or infinite pixels in {int(bad.sum())} of {len(bad)}, first with seed "
            f"{seeds[int(bad.int().argmax())]}; expected numbers: the denoiser or the VAE overflowed, as float16 does "
            "(load in float32), or a scheme of too few bits broke it (leave it out)"
        )


def as_bytes(images: torch.Tensor) -> torch.Tensor:
    """Return finite images in [0, 1] as uint8, as a user gets them."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def devices_of(pipe: DiffusionPipeline) -> set[torch.device]:
    """Return every device that a pipeline computes on, with offloading the one that its parts are brought to."""
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return {pipe._execution_device} | {tensor.device for part in modules for tensor in part.parameters()}


def calibration_calls(
    pipe: DiffusionPipeline, protocol: Protocol, seeds: Sequence[int], *, steps: int | None = None
) -> list[Call]:
    """Generate one image per seed and return every call of the denoiser: all timesteps of the trajectories."""
    with record_calls(get_denoiser(pipe)) as recording:
        generate(pipe, protocol, seeds, steps=steps)
    return recording.calls
