"""What a pipeline must take and make to be measured, checked before anything is computed."""

import inspect
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from quantdm.errors import QuantDMError
from quantdm.pipelines.protocol import Protocol

_SETTINGS = ("generator", "num_inference_steps", "guidance_scale", "output_type")
_TEMPORAL = {"num_frames", "frames", "video_length"}
_PICTURES = {
    "image", "images", "init_image", "input_image", "mask_image", "mask", "control_image", "control_video", "video",
    "conditioning_frames", "adapter_image", "reference_image", "condtioning_image", "task_prompt_image",
}  # fmt: skip


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
        and name not in (protocol.argument, *_SETTINGS)
    ]
    if needs:
        raise QuantDMError(f"{kind}: needs {', '.join(needs)} beside the {protocol.argument}; no protocol gives that")


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


def pixels_of(pipe: DiffusionPipeline, out: Any) -> torch.Tensor:
    """Return what a pipeline made as float32 [N, C, H, W].

    Raises:
        QuantDMError: it has no images, or they have neither one channel nor three.
    """
    images = getattr(out, "images", None)
    if not isinstance(images, np.ndarray) or images.ndim != 4 or images.shape[-1] not in (1, 3):
        got = tuple(images.shape) if isinstance(images, np.ndarray) else type(out).__name__
        raise QuantDMError(f"{type(pipe).__name__}: made {got}, expected images [N, H, W, C] with one channel or three")
    return torch.from_numpy(images).permute(0, 3, 1, 2).float()
