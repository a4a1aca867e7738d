"""Generate images with one generator per image; record trajectories for calibration."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from quantdm.denoisers.calls import Call, record_calls
from quantdm.errors import QuantDMError
from quantdm.pipelines.parts import get_denoiser
from quantdm.pipelines.protocol import Protocol


def image_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one generator per image, so that an image depends on its seed and not on the batch around it."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
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
        float32 images [N, 3, H, W] in [0, 1] on the CPU.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    if protocol.argument not in accepted:
        raise QuantDMError(
            f"protocol: {type(pipe).__name__} takes no {protocol.argument!r}; expected a protocol whose argument is "
            "one of " + ", ".join(a for a in ("prompt", "class_labels") if a in accepted)
        )
    images = []
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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(batch[0])
            out = pipe(**settings).images  # pyright: ignore[reportCallIssue]
        images.append(torch.from_numpy(out).permute(0, 3, 1, 2).float())
        if progress is not None:
            progress(len(batch))
    return torch.cat(images).contiguous()


@contextmanager
def memoized_text_encoders(pipe: DiffusionPipeline) -> Iterator[None]:
    """Encode every prompt batch once while the context is open: text encoders remember their outputs by input ids."""
    encoders = [m for n, m in pipe.components.items() if n.startswith("text_encoder") and isinstance(m, nn.Module)]
    for encoder in encoders:
        encoder.forward = _memoize(encoder.forward)  # an instance attribute that hides the method
    try:
        yield
    finally:
        for encoder in encoders:
            del encoder.forward


def _memoize(forward: Callable) -> Callable:
    memory: dict[tuple, Any] = {}

    def remembered(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # stands in for any text encoder
        key = (input_ids.shape, input_ids.cpu().numpy().tobytes(), repr(args), repr(sorted(kwargs.items())))
        if key not in memory:
            memory[key] = forward(input_ids, *args, **kwargs)
        return memory[key]

    return remembered


def calibration_calls(
    pipe: DiffusionPipeline, protocol: Protocol, seeds: Sequence[int], *, steps: int | None = None
) -> list[Call]:
    """Generate one image per seed and return every call of the denoiser: all timesteps of the trajectories."""
    with record_calls(get_denoiser(pipe)) as recording:
        generate(pipe, protocol, seeds, steps=steps)
    return recording.calls
