"""The task and the loading snippet of a model card: what the pipeline's class takes, and what it was measured with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from quantdm.pipelines.exported import exported
from quantdm.pipelines.signature import VIDEOS, CallSignature

_USUAL = {"prompt": "a photo of a lighthouse", "class_labels": [1]}
_FRAMES = 9  # of a video that is given, where nothing is known of it
_SIDE = 512


def signature_of(index: Mapping[str, Any]) -> CallSignature | None:
    """Return the call of the pipeline that a model_index.json names; None where diffusers exports no such class."""
    cls = exported(str(index.get("_class_name")))
    if not (isinstance(cls, type) and issubclass(cls, DiffusionPipeline)):
        return None
    return CallSignature.of_class(cls, [name for name in index if not name.startswith("_")])


def task_of(signature: CallSignature | None, index: Mapping[str, Any]) -> str:
    """Return the Hub's name of what a pipeline does (its `pipeline_tag`)."""
    if signature is None:
        return "text-to-image" if index.get("tokenizer") else "unconditional-image-generation"
    made, pictures = signature.makes or "image", signature.pictures_needed()
    if pictures:
        return f"{'video' if 'video' in pictures else 'image'}-to-{made}"
    return f"text-to-{made}" if "prompt" in signature else f"unconditional-{made}-generation"


def snippet(
    folder: Path, index: Mapping[str, Any], example: Mapping[str, Any] | None = None, *, corrected: bool = False
) -> str:
    """Return Python that loads an export and makes one image or video; it runs where the directory lies.

    Args:
        folder: the export.
        index: its model_index.json.
        example: argument -> value of the pipeline's call, as `example_call` gives them (None: what the class needs).
        corrected: whether a correction of the sampler lies beside it.
    """
    signature = signature_of(index)
    given = dict(example) if example is not None else _needed(signature, index)
    video = signature is not None and signature.makes == "video"
    if video and signature is not None and "output_type" in signature:
        given["output_type"] = "pil"
    pictures = {name: value for name, value in given.items() if _is_picture(value)}
    texts = [f"{name}={name}" if name in pictures else f"{name}={value!r}" for name, value in given.items()]
    absent = "".join(f", {name}=None" for name in _to_be_told(index))
    lines = [
        *(["from PIL import Image"] if pictures else []),
        "from diffusers import DiffusionPipeline",
        "",
        "import quantdm  # makes itself known to diffusers and transformers",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{folder.name}"{absent})  # or its name on the Hub',
    ]
    if corrected:
        lines += [
            f'correction = quantdm.load_correction("{folder.name}/correction.safetensors")',
            "quantdm.apply_correction(pipe, correction)  # undoes quantization noise in the sampler",
        ]
    lines += [f"{name} = {_picture(value)}  # yours: Image.open(...)" for name, value in pictures.items()]
    return "\n".join([*lines, *_made(signature, ", ".join(texts), video=video)])


def _to_be_told(index: Mapping[str, Any]) -> list[str]:
    """Return the parts that a pipeline lacks and that its class does not call optional: diffusers must be told."""
    optional = getattr(exported(str(index.get("_class_name"))), "_optional_components", ())
    return [name for name, value in index.items() if value == [None, None] and name not in optional]


def _made(signature: CallSignature | None, arguments: str, *, video: bool) -> list[str]:
    if not video or signature is None:
        return [f"image = pipe({arguments}).images[0]"]
    field = next((name for name in VIDEOS if name in signature.made), VIDEOS[0])
    return [
        f"frames = pipe({arguments}).{field}[0]  # diffusers.utils.export_to_video(frames, FILE) writes a film",
        "image = frames[0]",
    ]


def _needed(signature: CallSignature | None, index: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a pipeline must be given, where nothing is known but its class."""
    if signature is None:
        return {"prompt": _USUAL["prompt"]} if index.get("tokenizer") else {}
    given = {name: value for name, value in _USUAL.items() if name in signature}
    if "prompt" in given:
        given.pop("class_labels", None)
    side = {"picture": [_SIDE, _SIDE]}
    return given | {
        name: {**side, **({"frames": _FRAMES} if "video" in name else {})} for name in signature.pictures_needed()
    }


def _is_picture(value: Any) -> bool:
    return isinstance(value, Mapping) and "picture" in value


def _picture(value: Mapping[str, Any]) -> str:
    width, height = value["picture"]
    one = f'Image.new("RGB", ({width}, {height}), "gray")'
    return f"[{one}] * {value['frames']}" if value.get("frames") else one
