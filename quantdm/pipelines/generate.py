"""Generate images with one generator per image; record trajectories for calibration."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import nn

from quantdm.denoisers.calls import Call, mark_recordings, record_calls
from quantdm.errors import QuantDMError
from quantdm.machine import seeded
from quantdm.pipelines.checks import check_generates, results_of
from quantdm.pipelines.parts import find_denoisers, get_denoiser
from quantdm.pipelines.planning import arguments_of, plan, stands_alone
from quantdm.pipelines.protocol import Protocol
from quantdm.pipelines.signature import CallSignature, output_of
from quantdm.pipelines.sizes import LOT, auto_batch, come_in_lots, halve_batch, held, is_out_of_memory

# What pipelines call the list of the images that their safety checker blanked.
FLAGS = ("nsfw_content_detected", "nsfw_detected")


@dataclass(frozen=True)
class Generated:
    """The images of one call (as `generate` returns them), and which of them a safety checker flagged, bool [N]."""

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
    batch_size: int | Literal["auto"] = "auto",
    lots: bool = False,
    progress: Callable[[int], object] | None = None,
) -> torch.Tensor:
    """Generate one image (or video) per seed; image i is given what the protocol says of image `first + i`.

    Args:
        pipe: any pipeline that makes images or videos.
        protocol: what is asked for, the guidance scale and the default number of steps.
        seeds: one per image. Schedulers that draw noise without a generator are seeded per batch, state restored.
        steps: number of denoising steps (None: the protocol's); without effect where a pipeline takes none.
        first: index of the first image.
        batch_size: images per call of the pipeline at most ("auto": found from memory, see `auto_batch`); halved where
            memory runs out. Videos and images with pictures are made one by one in any case.
        lots: make the small images of small pipelines in lots of one size, the last filled up, whatever `batch_size`
            says: sums in products of other shapes are rounded otherwise, so only then an image is the same bit by bit
            in every batch. Off where calls are recorded: what fills a lot up is no image.
        progress: called with the number of images done after every batch.

    Returns:
        float32 on the CPU: images [N, C, H, W] or videos [N, F, C, H, W] in [0, 1], one channel (grey) or three;
        latents as the pipeline has them, [N, ...].

    Raises:
        QuantDMError: `check_generates` refuses the pipeline, it refuses its call, there are no seeds, what comes out
            are no images, or of several sizes, or a pixel is NaN or infinite (names the seed).
    """
    found = [
        batch.images
        for batch in generate_batches(
            pipe, protocol, seeds, steps=steps, first=first, batch_size=batch_size, lots=lots, progress=progress
        )
    ]
    return torch.cat(found).contiguous()


def generate_batches(
    pipe: DiffusionPipeline,
    protocol: Protocol,
    seeds: Sequence[int],
    *,
    steps: int | None = None, first: int = 0,
    batch_size: int | Literal["auto"] = "auto", lots: bool = False,
    progress: Callable[[int], object] | None = None,
    any_pixels: bool = False,
) -> Iterator[Generated]:  # fmt: skip
    """Generate as `generate` does, and yield the images of every call as they come, in the order of the seeds.

    With `any_pixels` only the form of what comes out is looked at, not whether its pixels are numbers.
    """
    check_generates(pipe, protocol, files=False)
    _check_asked(seeds, steps)
    signature = CallSignature.of(pipe)
    alone = stands_alone(signature, protocol, output := output_of(signature, protocol))
    most = most_at_once(pipe, protocol, batch_size)
    fill = lots and not alone and come_in_lots(pipe, protocol)
    most, shape, start = LOT if fill else most, None, 0
    while start < len(seeds):  # planned anew after every call: memory may have said that fewer images fit
        call = next(plan(signature, protocol, len(seeds) - start, first=first + start, most=most))
        batch = list(seeds[start : start + call.count])
        call = call.filled(LOT) if fill else call
        made = image_generators(batch + batch[-1:] * (call.count - len(batch)))
        settings = arguments_of(
            pipe, signature, protocol, call, generators=made, steps=steps or protocol.steps, output=output, alone=alone
        )
        take_back = mark_recordings(find_denoisers(pipe).values())
        out = _call(pipe, settings, batch)
        if out is None:
            take_back()
            most, fill = halve_batch(pipe, call.count), False
            continue
        start += len(batch)
        images = results_of(pipe, out, output, call.count)[: len(batch)]
        if not any_pixels:
            check_pixels(images, batch)
        shape = _same_shape(images, shape, batch[0])
        yield Generated(images, _flags(out, call.count)[: len(batch)])
        if progress is not None:
            progress(len(batch))


def _check_asked(seeds: Sequence[int], steps: int | None) -> None:
    if not hasattr(seeds, "__len__"):
        raise QuantDMError(f"seeds: got {seeds!r}, expected one whole number per image, such as range(8)")
    if steps is not None and steps < 1:
        raise QuantDMError(f"steps: got {steps}, expected 1 or more, or None for those of the protocol")
    if not len(seeds):
        raise QuantDMError("images: got no seeds, expected one or more, one per image")


def _same_shape(images: torch.Tensor, before: torch.Size | None, seed: int) -> torch.Size:
    """Return the shape of each of some images, checked to be that of those before."""
    if before not in (None, images.shape[1:]):
        raise QuantDMError(
            f"images: got {tuple(images.shape[1:])} with seed {seed} after {tuple(before or ())}, expected one size: "
            "give all rows pictures of one size, or a resolution"
        )
    return images.shape[1:]


def most_at_once(pipe: DiffusionPipeline, protocol: Protocol, batch_size: int | Literal["auto"] = "auto") -> int:
    """Return how many images one call of a pipeline makes at most.

    Raises:
        QuantDMError: fewer than one is asked for.
    """
    if batch_size != "auto" and batch_size < 1:
        raise QuantDMError(f"batch_size: got {batch_size}, expected one image or more, or 'auto'")
    signature = CallSignature.of(pipe)
    if stands_alone(signature, protocol, output_of(signature, protocol)):
        return 1
    return auto_batch(pipe, protocol) if batch_size == "auto" else held(pipe, batch_size)


def count_calls(
    pipe: DiffusionPipeline, protocol: Protocol, images: int, *, batch_size: int | Literal["auto"] = "auto"
) -> int:
    """Return how many calls of the pipeline make that many images: one batch is one call."""
    most = most_at_once(pipe, protocol, batch_size)
    return len(list(plan(CallSignature.of(pipe), protocol, images, first=0, most=most)))


@torch.no_grad()
def _call(pipe: DiffusionPipeline, settings: dict[str, Any], batch: list[int]) -> Any:
    """Call a pipeline; what it refuses is one clear error. None: its memory does not hold so many images."""
    with seeded(batch[0], devices_of(pipe)):
        try:
            return pipe(**settings)  # pyright: ignore[reportCallIssue]
        except QuantDMError:
            raise
        except (ValueError, TypeError, MemoryError, RuntimeError) as error:  # the last: sizes that do not fit
            if is_out_of_memory(error):
                return None
            reason = " ".join(str(error).split())
            given = ", ".join(name for name in settings if name not in ("generator", "output_type"))
            raise QuantDMError(f"{type(pipe).__name__}: refused its call with {given}: {reason:.300}") from error


def _flags(out: Any, count: int) -> torch.Tensor:
    found = next((list(flags) for name in FLAGS if (flags := getattr(out, name, None)) is not None), [False] * count)
    flags = [bool(flag) for flag in found]
    return torch.tensor(flags if len(flags) == count else [any(flags)] * count)  # of the frames of one video


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


def as_pictures(images: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """Return what `generate` made as uint8 pictures [N, C, H, W].

    The frames of videos follow each other; latents become grey, channels below each other: 128 is 0, 8 spans the range.
    """
    if protocol.output == "latent":
        return as_bytes(0.5 + images.flatten(1, -2)[:, None] / 8)
    return as_bytes(images.flatten(0, 1) if images.ndim == 5 else images)


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
