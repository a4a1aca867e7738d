"""From a protocol to calls of a pipeline: which images one call makes, and with which arguments."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from quantdm.pipelines.inputs import Clip, Constant, Drawn, Picture, TensorFile
from quantdm.pipelines.protocol import FIRST_ARGUMENTS, Protocol
from quantdm.pipelines.signature import CallSignature, Output, output_of
from quantdm.pipelines.sizes import image_size

_FILES = (Picture, Clip, TensorFile, Drawn)


@dataclass
class PlannedCall:
    """Images start to stop - 1: arguments of the whole call, and those with one value per image."""

    start: int
    shared: dict[str, Any]
    each: dict[str, list[Any]] = field(default_factory=dict)
    count: int = 0

    def filled(self, count: int) -> "PlannedCall":
        """Return a call of `count` images: the last one again where there are fewer."""
        more = count - self.count
        return replace(
            self, each={name: values + values[-1:] * more for name, values in self.each.items()}, count=count
        )


def stands_alone(signature: CallSignature, protocol: Protocol, output: Output) -> bool:
    """Tell whether every image needs a call of its own.

    Videos and images with pictures do: a list of pictures is one per image for some pipelines, several for one image
    for others. So does what a pipeline has no list or no number for.
    """
    if output == "video" or "generator" not in signature or not signature.takes_lists("generator"):
        return True
    values = {name: protocol.values_of(name) for name in protocol.arguments}
    if any(isinstance(v, _FILES) for found in values.values() for v in found):
        return True
    if any(isinstance(v, Constant) for name in FIRST_ARGUMENTS for v in values.get(name, ())):
        return True
    lists = any(signature.per_image(name, v) for name, found in values.items() for v in found)
    return not lists and "batch_size" not in signature


def plan(signature: CallSignature, protocol: Protocol, count: int, *, first: int, most: int) -> Iterator[PlannedCall]:
    """Yield the calls that make images `first` to `first + count - 1`, at most `most` in each.

    Arguments without a list form (a strength, a size) are one per call, so a call ends where one changes.
    """
    call: PlannedCall | None = None
    for index in range(count):
        shared, each = {}, {}
        for name, value in protocol.of_image(first + index).items():
            (each if signature.per_image(name, value) and not isinstance(value, Constant) else shared)[name] = value
        if call is None or call.count == most or call.shared != shared or set(call.each) != set(each):
            if call is not None:
                yield call
            call = PlannedCall(index, shared, {name: [] for name in each})
        for name, value in each.items():
            call.each[name].append(value)
        call.count += 1
    if call is not None:
        yield call


def arguments_of(
    pipe: DiffusionPipeline,
    signature: CallSignature,
    protocol: Protocol,
    call: PlannedCall,
    *,
    generators: Sequence[torch.Generator],
    steps: int,
    output: Output,
    alone: bool,
) -> dict[str, Any]:
    """Return the keyword arguments of one call; files are opened here, and not kept."""
    size = image_size(pipe, protocol) if any(isinstance(v, _FILES) for v in call.shared.values()) else (0, 0)
    fit = protocol.resolution is not None
    found = {
        name: value.open(size, fit) if isinstance(value, (*_FILES, Constant)) else value
        for name, value in call.shared.items()
    }
    for name, values in call.each.items():
        found[name] = values[0] if alone and signature.takes_one(name) else values
    name = signature.steps_argument(protocol)
    if name is not None:
        found[name] = steps
    if protocol.guidance_scale is not None:
        found["guidance_scale"] = protocol.guidance_scale
    for side in ("height", "width"):
        if protocol.resolution is not None and side in signature and side not in found:
            found[side] = protocol.resolution
    if "generator" in signature:
        single = alone and "Generator" in signature.words("generator")
        found["generator"] = generators[0] if single else list(generators)
    if "batch_size" in signature:
        found["batch_size"] = call.count
    if "output_type" in signature:
        found["output_type"] = "latent" if output == "latent" else "np"
    return found


def example_call(pipe: DiffusionPipeline, protocol: Protocol) -> dict[str, Any]:
    """Return the arguments of the first image as JSON values; a picture as {"picture": [width, height]}.

    The frames of a video are counted beside it; tensors have no place in JSON and are left out.
    """
    signature = CallSignature.of(pipe)
    output = output_of(signature, protocol)
    alone = stands_alone(signature, protocol, output)
    call = next(plan(signature, protocol, 1, first=0, most=1))
    given = arguments_of(
        pipe, signature, protocol, call, generators=[torch.Generator()], steps=protocol.steps, output=output,
        alone=alone,
    )  # fmt: skip
    own = ("generator", "batch_size", "output_type")
    plain = {name: _plain(value) for name, value in given.items() if name not in own}
    return {name: value for name, value in plain.items() if not isinstance(value, torch.Tensor)}


def _plain(value: Any) -> Any:
    """Return a picture, or the frames of a video, as its size; all else as it is."""
    if isinstance(value, Image.Image):
        return {"picture": list(value.size)}
    if isinstance(value, list) and value and isinstance(value[0], Image.Image):
        return {"picture": list(value[0].size), "frames": len(value)}
    return value
