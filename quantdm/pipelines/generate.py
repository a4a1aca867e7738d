"""Generate images with one generator per image; record trajectories for calibration."""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, get_args

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
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
        float32 images [N, C, H, W] in [0, 1] on the CPU, one channel (grey) or three.

    Raises:
        QuantDMError: `check_generates` refuses the pipeline, there are no seeds, or what comes out are no images.
    """
    check_generates(pipe, protocol)
    if not len(seeds):
        raise QuantDMError("images: got no seeds, expected one or more, one per image")
    accepted = inspect.signature(pipe.__call__).parameters
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
            out = pipe(**settings)  # pyright: ignore[reportCallIssue]
        images.append(_pixels(pipe, out))
        if progress is not None:
            progress(len(batch))
    return torch.cat(images).contiguous()


def check_generates(pipe: DiffusionPipeline, protocol: Protocol) -> None:
    """Check, before anything is computed, that a pipeline makes images from what a protocol asks for and from noise.

    Raises:
        QuantDMError: it takes no such argument or setting, needs an image or something else, or makes videos or sound.
    """
    kind = type(pipe).__name__
    parameters = inspect.signature(pipe.__call__).parameters
    made = _fields_of_outputs(type(pipe))
    if set(parameters) & _TEMPORAL or (made and "images" not in made):
        what = "videos" if set(parameters) & _TEMPORAL or "frames" in made else ", ".join(sorted(made))
        raise QuantDMError(f"{kind}: makes {what}, expected a pipeline that makes images; these are not measured yet")
    asks = [
        name for name, parameter in parameters.items() if name in _PICTURES and _must_be_given(parameter, parameters)
    ]
    if asks:
        raise QuantDMError(
            f"{kind}: needs a picture ({', '.join(asks)}) beside the {protocol.argument}, expected a pipeline that "
            "starts from noise; open the same parts as one, e.g. StableDiffusionPipeline.from_pipe(pipe)"
        )
    if protocol.argument not in parameters:
        known = [a for a in ("prompt", "class_labels") if a in parameters]
        remedy = (
            f"expected a protocol whose argument is {' or '.join(known)}" if known else "it takes no condition at all"
        )
        raise QuantDMError(f"protocol: {kind} takes no {protocol.argument!r}; {remedy}")
    lacking = [name for name in _SETTINGS if name not in parameters]
    if lacking:
        raise QuantDMError(f"{kind}: takes no {', '.join(lacking)}, which a protocol sets; it cannot be measured")
    needs = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name != protocol.argument
    ]
    if needs:
        raise QuantDMError(f"{kind}: needs {', '.join(needs)} beside the {protocol.argument}; no protocol gives that")


_SETTINGS = ("generator", "num_inference_steps", "guidance_scale", "output_type")
_TEMPORAL = {"num_frames", "frames", "video_length"}
_PICTURES = {
    "image", "images", "init_image", "input_image", "mask_image", "mask", "control_image", "control_video", "video",
    "conditioning_frames", "adapter_image", "reference_image", "condtioning_image", "task_prompt_image",
}  # fmt: skip


def _must_be_given(parameter: inspect.Parameter, parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Tell whether a picture is asked for: pipelines that edit annotate it as one and default it to None all the same.

    Beside a mask every picture is needed; else one whose annotation allows None is an extra.
    """
    if parameter.default is parameter.empty or "mask_image" in parameters:
        return True
    return type(None) not in get_args(parameter.annotation)


def _fields_of_outputs(pipeline: type) -> set[str]:
    """Return the names of what a pipeline may return: the fields of the output classes that its module knows."""
    module = vars(sys.modules[pipeline.__module__])
    outputs = [c for c in module.values() if isinstance(c, type) and issubclass(c, BaseOutput) and is_dataclass(c)]
    return {field.name for output in outputs for field in fields(output) if "Pipeline" in output.__name__}


def _pixels(pipe: DiffusionPipeline, out: Any) -> torch.Tensor:
    """Return what a pipeline made as float32 [N, C, H, W].

    Raises:
        QuantDMError: it has no images, or they have neither one channel nor three.
    """
    images = getattr(out, "images", None)
    if not isinstance(images, np.ndarray) or images.ndim != 4 or images.shape[-1] not in (1, 3):
        got = tuple(images.shape) if isinstance(images, np.ndarray) else type(out).__name__
        raise QuantDMError(f"{type(pipe).__name__}: made {got}, expected images [N, H, W, C] with one channel or three")
    return torch.from_numpy(images).permute(0, 3, 1, 2).float()


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
