"""What a pipeline's call takes and makes, read from its signature: names, kinds of values, lists, results."""

import difflib
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any, Literal

from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import nn

from quantdm.errors import QuantDMError
from quantdm.pipelines.exported import exported
from quantdm.pipelines.inputs import Clip, Constant, Drawn, Picture, TensorFile
from quantdm.pipelines.protocol import FIRST_ARGUMENTS, Protocol

Output = Literal["image", "video", "latent"]
STEPS = "num_inference_steps"
IMAGES, VIDEOS = ("images", "image"), ("frames", "video")  # what pipelines call their results
TEMPORAL = {"num_frames", "frames", "video_length"}
PICTURES = {
    "image", "images", "init_image", "input_image", "mask_image", "mask", "control_image", "control_video", "video",
    "conditioning_frames", "adapter_image", "reference_image", "condtioning_image", "task_prompt_image",
}  # fmt: skip
_PLAIN = {"str", "int", "float", "bool"}
_PICTURE_TYPES = {"Image", "ndarray", "PipelineImageInput", "PipelineInput"}
_OPEN = {"Any", "object", "dict", "Dict", "Callable", "Literal"}  # says nothing of the value


@dataclass(frozen=True)
class CallSignature:
    """The call of one pipeline."""

    kind: str
    parameters: Mapping[str, inspect.Parameter]
    made: frozenset[str]  # names of what it may return; empty where its module does not tell
    decodes: bool  # whether a part of it turns latents into pictures

    @classmethod
    def of(cls, pipe: DiffusionPipeline) -> "CallSignature":
        """Read the signature of a pipeline; the parts are looked at only for what they are called."""
        if not callable(pipe):
            raise QuantDMError(f"{type(pipe).__name__}: cannot be called, expected a pipeline that makes something")
        return cls.of_class(type(pipe), list(vars(pipe).get("_internal_dict") or {}))

    @classmethod
    def of_class(cls, kind: type, parts: Sequence[str]) -> "CallSignature":
        """Read the signature of a class of pipelines with parts of these names."""
        decoders = any(re.search(r"vae|vq|movq|decoder|image_encoder", name) for name in parts)
        found = dict(inspect.signature(kind.__call__).parameters)
        found.pop("self", None)
        return cls(kind.__name__, found, frozenset(_fields_of_outputs(kind)), decoders)

    @property
    def names(self) -> list[str]:
        """The names of all parameters."""
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return [name for name, parameter in self.parameters.items() if parameter.kind not in variable]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def text(self, name: str) -> str:
        """Return the annotation as text; "" where there is none."""
        annotation = self.parameters[name].annotation
        if annotation is inspect.Parameter.empty:
            return ""
        return getattr(annotation, "__name__", str(annotation)) if isinstance(annotation, type) else str(annotation)

    def words(self, name: str) -> set[str]:
        """Return the names of the types in an annotation."""
        return set(re.findall(r"\w+", self.text(name)))

    def takes_lists(self, name: str) -> bool:
        """Tell whether the annotation allows a list (as does a missing one)."""
        return not self.text(name) or bool(re.search(r"\b[Ll]ist\[", self.text(name)))

    def takes_one(self, name: str) -> bool:
        """Tell whether the annotation allows a plain value beside lists (a missing one does not tell, so: no)."""
        outside = re.sub(r"\b[Ll]ist\[[^\[\]]*\]", "", self.text(name))
        return bool(set(re.findall(r"\w+", outside)) & (_PLAIN | _PICTURE_TYPES | {"Tensor"}))

    def per_image(self, name: str, value: Any) -> bool:
        """Tell whether a batch takes one such value per image, as a list: prompts and class labels.

        A list of numbers elsewhere is one per ControlNet, or a schedule: those are no values of images.
        """
        if name in FIRST_ARGUMENTS:
            return self.takes_lists(name)
        text = isinstance(value, str) or (value is None and "prompt" in name)
        return text and "str" in self.words(name) and self.takes_lists(name)

    def steps_argument(self, protocol: Protocol) -> str | None:
        """Return what the pipeline calls its steps; None where it takes no number of steps.

        Raises:
            QuantDMError: the protocol names one that is not there, or there are several.
        """
        found = [STEPS] if STEPS in self else [name for name in self.names if name.endswith(STEPS)]
        if protocol.steps_argument is not None:
            if protocol.steps_argument not in self:
                remedy = similar(protocol.steps_argument, found or self.names)
                raise QuantDMError(
                    f"protocol: steps_argument: {self.kind} takes no {protocol.steps_argument!r}; {remedy}"
                )
            return protocol.steps_argument
        if len(found) > 1:
            raise QuantDMError(
                f"{self.kind}: takes {', '.join(found)}; say which of them `steps` is (steps_argument: {found[-1]}), "
                "and give the others in call"
            )
        return found[0] if found else None

    @cached_property
    def makes(self) -> Literal["image", "video"] | None:
        """What the pipeline makes; None: neither images nor videos."""
        temporal = bool(set(self.names) & TEMPORAL)
        if temporal or set(VIDEOS) & self.made:
            return "video" if not self.made or self.made & {*VIDEOS, *IMAGES} else None
        return "image" if not self.made or set(IMAGES) & self.made else None

    def pictures_needed(self) -> list[str]:
        """Return the pictures that must be given: pipelines that edit default them to None all the same.

        Beside a mask every picture is needed; else one whose annotation allows None is an extra.
        """
        return [name for name in self.names if name in PICTURES and self._must_be_given(name)]

    def _must_be_given(self, name: str) -> bool:
        if self.parameters[name].default is inspect.Parameter.empty or "mask_image" in self:
            return True
        return not self.words(name) & {"None", "NoneType", "Optional"}

    def refuses(self, name: str, value: Any) -> str | None:
        """Return what an argument expects, in words, if this value is of another type; None: it may be right."""
        words, text = self.words(name), self.text(name)
        if not words or words & _OPEN or isinstance(value, Constant):
            return None if words or not name.startswith("prompt") or isinstance(value, str) else "text"
        default = self.parameters[name].default
        allowed = {
            "str": "str" in words,
            "bool": bool({"bool", "int"} & words),
            "int": bool({"int", "float"} & words),
            "float": "float" in words or isinstance(default, float),
            "NoneType": bool({"None", "NoneType", "Optional"} & words) or default is None,
        }
        pictures = bool(words & _PICTURE_TYPES) or any(word.endswith("Tensor") for word in words)
        if isinstance(value, (Picture, Drawn, Clip)):
            right = pictures
        elif isinstance(value, TensorFile):
            right = any(word.endswith("Tensor") for word in words)
        else:
            right = allowed[type(value).__name__] and (self.per_image(name, value) or self._plain_is_right(name, value))
        if right:
            return None
        only_text = words & _PLAIN == {"str"} and self.takes_one(name)
        return "text" if only_text else re.sub(r"typing\.|numpy\.|torch\.|PIL\.Image\.", "", text)

    def _plain_is_right(self, name: str, value: Any) -> bool:
        return value is None or self.takes_one(name) or (isinstance(value, str) and self.takes_lists(name))


def similar(name: str, known: list[str]) -> str:
    """Return which known names are the nearest."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    if close:
        return f"nearest: {', '.join(close)}"
    return f"it takes {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}"


def output_of(signature: CallSignature, protocol: Protocol) -> Output:
    """Return what a protocol's images are: what it says, else what the pipeline makes.

    Raises:
        QuantDMError: the pipeline makes no such thing.
    """
    made = signature.makes
    if made is None:
        raise QuantDMError(
            f"{signature.kind}: makes {', '.join(sorted(signature.made))}, expected a pipeline that makes images or "
            "videos; others are not measured"
        )
    if protocol.output is None or protocol.output == made:
        return made
    if protocol.output != "latent":
        raise QuantDMError(f"protocol: output: got {protocol.output}, but {signature.kind} makes {made}s; leave it out")
    if not signature.decodes or "output_type" not in signature:
        raise QuantDMError(f"protocol: output: {signature.kind} has no latents, it makes {made}s; leave it out")
    return "latent"


def makes_videos(class_name: str) -> bool:
    """Tell whether diffusers has a class of pipelines of that name, and it makes videos."""
    kind = exported(class_name)
    return (
        inspect.isclass(kind)
        and issubclass(kind, DiffusionPipeline)
        and CallSignature.of_class(kind, ()).makes == "video"
    )


def _fields_of_outputs(pipeline: type) -> set[str]:
    """Return the names of what a pipeline may return: the fields of the output classes that its module knows."""
    module = vars(sys.modules[pipeline.__module__])
    outputs = [c for c in module.values() if isinstance(c, type) and issubclass(c, BaseOutput) and is_dataclass(c)]
    return {field.name for output in outputs for field in fields(output) if "Pipeline" in output.__name__}


def class_limit(pipe: DiffusionPipeline) -> int | None:
    """Return how many classes the denoiser of a class-conditional pipeline knows; None: it does not tell."""
    for part in getattr(pipe, "components", {}).values():
        config = getattr(part, "config", None) if isinstance(part, nn.Module) else None
        for key in ("num_embeds_ada_norm", "num_class_embeds"):
            found = getattr(config, key, None)
            if isinstance(found, int):
                return found
    return None
