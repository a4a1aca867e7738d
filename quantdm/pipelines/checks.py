"""What a pipeline must take and make to be measured, checked before anything is computed."""

import inspect
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from quantdm.errors import QuantDMError, counted
from quantdm.pipelines.inputs import Clip, Drawn, Picture, open_picture
from quantdm.pipelines.planning import PlannedCall, arguments_of, plan, stands_alone
from quantdm.pipelines.protocol import FIRST_ARGUMENTS, Protocol, check_files, check_protocol
from quantdm.pipelines.signature import (
    IMAGES,
    VIDEOS,
    CallSignature,
    Output,
    class_limit,
    output_of,
    similar,
)
from quantdm.pipelines.sizes import image_size

# Set by quantdm itself, so that image i depends on its seed alone.
_RESERVED = {
    "generator": "it follows from the seed of each image",
    "output_type": "write `output: image, video or latent`",
    "return_dict": "it is quantdm's own",
    "batch_size": "it is found from memory",
    "num_images_per_prompt": "every seed makes one image",
    "num_videos_per_prompt": "every seed makes one video",
    "guidance_scale": "write `guidance_scale:` beside steps",
    "latents": "they follow from the seed of each image",
}
_DISTINCT_CALLS = 64  # that are checked by the pipeline itself


def check_generates(pipe: DiffusionPipeline, protocol: Protocol, *, files: bool = True) -> None:
    """Check, before anything is computed, that a pipeline can make what a protocol asks for.

    Args:
        files: whether the files that the protocol names are read and checked, too.

    Raises:
        QuantDMError: an argument is unknown, missing or of another type, a file is missing or was changed, or the
            pipeline makes no images and no videos.
    """
    check_protocol(protocol)
    protocol = Protocol(**{name: getattr(protocol, name) for name in Protocol.model_fields})  # copies are not checked
    signature = CallSignature.of(pipe)
    output = output_of(signature, protocol)
    _check_given(signature, protocol)
    _check_needed(signature, protocol)
    _check_settings(signature, protocol)
    _check_values(pipe, signature, protocol)
    if files:
        check_files(protocol)
        _check_sizes(protocol)
        _ask_pipeline(pipe, signature, protocol, output)


def _check_given(signature: CallSignature, protocol: Protocol) -> None:
    """Check that every argument that is given exists and may be given."""
    kind, own = signature.kind, signature.steps_argument(protocol)
    for name in protocol.arguments:
        if name == own:
            raise QuantDMError(f"protocol: {name} cannot be an argument of its own: write `steps:`")
        if name in _RESERVED:
            raise QuantDMError(f"protocol: {name} cannot be given: {_RESERVED[name]}")
        if name in signature:
            continue
        if name != protocol.argument or name not in FIRST_ARGUMENTS:
            raise QuantDMError(f"protocol: {kind} takes no {name!r}; {similar(name, signature.names)}")
        known = [a for a in FIRST_ARGUMENTS if a in signature] or signature.pictures_needed()
        remedy = (
            f"expected a protocol whose argument is {' or '.join(known)}"
            if known
            else "it takes no condition at all: write `argument: none`, without values"
        )
        raise QuantDMError(f"protocol: {kind} takes no {name!r}; {remedy}")


def _check_needed(signature: CallSignature, protocol: Protocol) -> None:
    """Check that everything that the pipeline needs is given."""
    given = {*protocol.arguments, *_RESERVED, signature.steps_argument(protocol)}
    if protocol.guidance_scale is None:
        given.discard("guidance_scale")
    beside = f" beside the {protocol.argument}" if protocol.argument else ""
    pictures = [name for name in signature.pictures_needed() if name not in given]
    if pictures:
        raise QuantDMError(
            f"{signature.kind}: needs a picture ({', '.join(pictures)}){beside}: give it in call or rows "
            f"(call: {{{pictures[0]}: {{images: FOLDER}}}}), or open the same parts as a pipeline that starts from "
            "noise, e.g. StableDiffusionPipeline.from_pipe(pipe)"
        )
    needs = [
        name
        for name in signature.names
        if signature.parameters[name].default is inspect.Parameter.empty and name not in given
    ]
    prompts = [name for name in protocol.arguments if "prompt" in name and not name.startswith("negative")]
    if "prompt" in signature and not signature.parameters["prompt"].default and not prompts:
        needs = ["prompt", *(name for name in needs if name != "prompt")]
    if needs:
        raise QuantDMError(
            f"{signature.kind}: needs {', '.join(needs)}{beside}; give it as argument with values, in call or in rows"
        )


def _check_settings(signature: CallSignature, protocol: Protocol) -> None:
    """Check steps, guidance scale and resolution."""
    kind = signature.kind
    if protocol.guidance_scale is not None and "guidance_scale" not in signature:
        scales = [name for name in signature.names if name.endswith("_scale")]
        also = f"; leave it out, or give {' or '.join(scales[:3])} in call" if scales else "; leave it out (version 2)"
        raise QuantDMError(f"{kind}: takes no guidance_scale, which the protocol sets{also}")
    if signature.steps_argument(protocol) is None and protocol.steps != 1:
        raise QuantDMError(f"{kind}: takes no number of steps, the protocol says {protocol.steps}; write `steps: 1`")
    sides = [side for side in ("height", "width") if side in signature]
    scaled = (Picture, Clip, Drawn)
    pictures = any(isinstance(v, scaled) for name in protocol.arguments for v in protocol.values_of(name))
    if protocol.version > 1 and protocol.resolution is not None and not sides and not pictures:
        raise QuantDMError(f"{kind}: takes no height and width, but the protocol has a resolution; leave it out")


def _check_values(pipe: DiffusionPipeline, signature: CallSignature, protocol: Protocol) -> None:
    """Check the type of every value, and the range of class labels."""
    for name in protocol.arguments:
        values = protocol.values_of(name)
        for index, value in enumerate(values):
            expected = signature.refuses(name, value)
            if expected is not None:
                place = f"{name}.{index}" if len(values) > 1 else name
                got = repr(value) if not isinstance(value, (Picture, Drawn)) else "a picture"
                lists = "; a list as it is: {value: [...]}" if "ist[" in expected else ""
                raise QuantDMError(f"protocol: {place}: got {got:.60}, {signature.kind} expects {expected}{lists}")
        if name in ("height", "width") and len(set(values)) > 1:
            raise QuantDMError(
                f"protocol: {name}: got {', '.join(map(str, sorted(set(values))))}, expected one: all images that are "
                "compared have one size"
            )
        limit = class_limit(pipe) if name == "class_labels" else None
        wrong = [v for v in values if isinstance(v, int) and limit is not None and not 0 <= v < limit]
        if wrong:
            raise QuantDMError(f"protocol: class_labels: got {wrong[0]}, expected 0 to {(limit or 0) - 1}")


def _check_sizes(protocol: Protocol) -> None:
    """Check that the pictures of an argument have one size where they are not scaled to one."""
    if protocol.resolution is not None:
        return
    for name in protocol.arguments:
        paths = [Path(value.image) for value in protocol.values_of(name) if isinstance(value, Picture)]
        sizes = {open_picture(path).size: path for path in paths}
        if len(sizes) > 1:
            told = ", ".join(f"{path.name} {width}x{height}" for (width, height), path in [*sizes.items()][:2])
            raise QuantDMError(
                f"protocol: {name}: pictures of different sizes ({told}), expected one; write `resolution: 512` to "
                "have all scaled and cropped to that"
            )


def _ask_pipeline(pipe: DiffusionPipeline, signature: CallSignature, protocol: Protocol, output: Output) -> None:
    """Let the pipeline check the arguments itself, where it has a function for that.

    Raises:
        QuantDMError: what the pipeline says.
    """
    check = getattr(pipe, "check_inputs", None)
    if check is None:
        return
    wanted = inspect.signature(check).parameters
    alone = stands_alone(signature, protocol, output)
    seen: set[str] = set()
    longest = max((len(protocol.values_of(name)) for name in protocol.arguments), default=1)
    for call in plan(signature, protocol, min(longest, 10 * _DISTINCT_CALLS), first=0, most=1):
        key = json.dumps({k: v for k, v in call.shared.items() if isinstance(v, (int, float, bool))}, sort_keys=True)
        if key in seen or len(seen) > _DISTINCT_CALLS:
            continue
        seen.add(key)
        given = _bound(pipe, signature, protocol, call, output, alone)
        if given is None or any(p.default is p.empty and name not in given for name, p in wanted.items()):
            return
        try:
            check(**{name: value for name, value in given.items() if name in wanted})
        except ValueError as error:
            raise QuantDMError(f"{signature.kind}: refuses the protocol: {' '.join(str(error).split())}") from None
        except Exception:  # its check wants more than the arguments: then the call itself will tell
            return


def _bound(
    pipe: DiffusionPipeline,
    signature: CallSignature,
    protocol: Protocol,
    call: PlannedCall,
    output: Output,
    alone: bool,
) -> dict[str, Any] | None:
    """Return all arguments of a call with their defaults; None where the parts of the pipeline do not tell a size."""
    with suppress(AttributeError, TypeError):
        given = arguments_of(
            pipe, signature, protocol, call, generators=[torch.Generator()], steps=protocol.steps, output=output,
            alone=alone,
        )  # fmt: skip
        defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}
        width, height = image_size(pipe, protocol)
        sizes = {"width": width, "height": height} if protocol.resolution is None else {}
        return {"callback_steps": None, **defaults, **{k: v for k, v in sizes.items() if k in defaults}, **given}
    return None


# ------------------------------------------------------------------------------------------------------------ results


def results_of(pipe: DiffusionPipeline, out: Any, output: Output, count: int) -> torch.Tensor:
    """Return what a pipeline made for `count` seeds as float32.

    Returns:
        images [N, C, H, W] or videos [N, F, C, H, W] in [0, 1], or latents [N, ...] as they are.

    Raises:
        QuantDMError: it made something else, or another number.
    """
    kind = type(pipe).__name__
    names = (*VIDEOS, *IMAGES) if output == "video" else (*IMAGES, *VIDEOS)
    found = [v for name in names if (v := getattr(out, name, None)) is not None]
    made = out[0] if isinstance(out, tuple) else found[0] if found else None
    if output == "latent":
        if not isinstance(made, torch.Tensor) or made.ndim < 3:
            raise QuantDMError(f"{kind}: made {_told(made)}, expected latents [N, ...]; it has no output of latents")
        result = made.detach().cpu().float()
    else:
        pixels = _as_array(made)
        if output == "video" and pixels is not None and pixels.ndim == 4 and count == 1:
            pixels = pixels[None]
        dims, shape = (4, "images [N, H, W, C]") if output == "image" else (5, "videos [N, F, H, W, C]")
        if pixels is None or pixels.ndim != dims or pixels.shape[-1] not in (1, 3):
            raise QuantDMError(f"{kind}: made {_told(made)}, expected {shape} with one channel or three")
        result = torch.from_numpy(pixels).movedim(-1, -3).float()
    if len(result) != count:
        raise QuantDMError(f"{kind}: made {len(result)} for {counted(count, 'seed')}, expected one for each")
    return result


def _told(made: Any) -> str:
    return str(tuple(made.shape)) if hasattr(made, "shape") else type(made).__name__


def _as_array(made: Any) -> np.ndarray | None:
    """Return pixels in [0, 1] as an array with the channels last; pipelines without `output_type` give pictures."""
    if isinstance(made, torch.Tensor):
        return made.detach().cpu().float().movedim(-3, -1).numpy() if made.ndim in (4, 5) else None
    if isinstance(made, np.ndarray):
        return made
    if isinstance(made, list) and made and hasattr(made[0], "convert"):
        found = np.stack([np.asarray(picture) for picture in made]).astype(np.float32) / 255
        return found[..., None] if found.ndim == 3 else found
    if isinstance(made, list) and made:
        inner = [_as_array(item) for item in made]
        return np.stack([a for a in inner if a is not None]) if all(a is not None for a in inner) else None
    return None
