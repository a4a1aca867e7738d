"""What the files of a stored pipeline say of quantization, checked before they are loaded and afterwards.

When a config says nothing of the packed tensors beside it, transformers only warns and carries on with random weights,
and diffusers with empty ones: here that is an error.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from quantdm.errors import QuantDMError
from quantdm.files import open_tensors

HEADER_KEY = "quantdm"  # in the metadata of a safetensors file
METHOD = "quantdm"  # the `quant_method` in config.json
SUFFIX = ".packed"  # of the names of packed weights

# model.fp16.safetensors, model.safetensors.index.fp16.json; its shards are in the index
_VARIANT = re.compile(r"\w+\.(?:safetensors\.index\.)?((?:(?!-\d{5}-of-\d{5}\.)[^.])+)\.(?:safetensors|json)$")
_STEMS = ("diffusion_pytorch_model", "model")  # of the weights of diffusers and of transformers


def read_header(path: Path) -> tuple[dict[str, str], list[str]]:
    """Return the metadata of a safetensors file and the names of its tensors.

    Raises:
        QuantDMError: the file is missing, damaged or not safetensors.
    """
    with open_tensors(path, remedy="copy or export it again") as file:
        return file.metadata() or {}, list(file.keys())


def read_object(path: Path) -> dict[str, Any]:
    """Return what a JSON file of a pipeline holds.

    Raises:
        QuantDMError: the file is not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise QuantDMError(f"{path}: not a JSON file ({error}); copy or export it again") from None
    if not isinstance(found, dict):
        raise QuantDMError(f"{path}: got a {type(found).__name__}, expected a JSON object; copy or export it again")
    return found


def stored_variant(folder: Path) -> str | None:
    """Return the variant that the weights of a pipeline, or of a lone network, were saved as.

    None for the ordinary files.

    Raises:
        QuantDMError: there are only variants, and several of them.
    """
    found: set[str] = set()
    for part in (path.parent for path in (*folder.glob("*/config.json"), folder / "config.json")):
        if any(True for _ in weight_files(part)):
            continue
        names = [path.name for stem in _STEMS for path in part.glob(f"{stem}.*safetensors*")]
        found |= {match.group(1) for name in names if (match := _VARIANT.match(name))}
    if len(found) > 1:
        raise QuantDMError(
            f"{folder}: its weights are there as the variants {', '.join(sorted(found))}; say which: variant=..."
        )
    return found.pop() if found else None


def check_stored(folder: Path, variant: str | None = None) -> dict[str, set[str]]:
    """Check that the configs and the weights of a pipeline agree on what is quantized, and that all files are there.

    Args:
        folder: of the pipeline.
        variant: of the weights, where a component has it.

    Returns:
        component -> names of its packed tensors, empty for one that is not quantized.

    Raises:
        QuantDMError: names the first file that is missing or damaged, or a component whose config.json says that
            quantdm quantized it while its weights say that it did not, or the reverse.
    """
    found = {}
    for name, entry in read_object(folder / "model_index.json").items():
        config = folder / name / "config.json"
        if not isinstance(entry, list) or not config.is_file():
            continue
        settings = read_object(config).get("quantization_config")
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        files = [*weight_files(config.parent, variant)] or [*weight_files(config.parent)]
        headers = [read_header(path) for path in files]
        packed = {key for _, keys in headers for key in keys if key.endswith(SUFFIX)}
        signed = any(HEADER_KEY in metadata for metadata, _ in headers)
        if method == METHOD and not packed and not signed:  # signed: every layer stayed in its original precision
            raise QuantDMError(
                f"{config}: says that quantdm quantized it, but there are no packed weights beside it; "
                "copy or export it again"
            )
        if method != METHOD and (signed or (packed and method is None)):
            raise QuantDMError(
                f"{config}: its weights were quantized by quantdm, but it has no `quantization_config` that says so; "
                "copy or export it again"
            )
        found[name] = packed if method == METHOD else set()
    return found


def check_opened(pipe: DiffusionPipeline, packed: Mapping[str, set[str]]) -> None:
    """Check that a loaded pipeline has all its weights, and packed layers where its files have them.

    Args:
        pipe: the pipeline, before anything of it is offloaded.
        packed: what `check_stored` found.

    Raises:
        QuantDMError: names the component and its first tensor that is missing.
    """
    for name, part in pipe.components.items():
        if not isinstance(part, nn.Module):
            continue
        tensors = part.state_dict()
        empty = [key for key, tensor in tensors.items() if tensor.is_meta]
        if empty:
            raise QuantDMError(
                f"{name}: {len(empty)} tensors were not in its files, first {empty[0]}; copy or export it again"
            )
        layers = sum(key.endswith(SUFFIX) for key in tensors)
        if name in packed and layers != len(packed[name]):
            raise QuantDMError(
                f"{name}: got {layers} packed layers, expected {len(packed[name])}; {type(part).__name__} was opened "
                "without quantdm: call quantdm.register() and load it again"
            )


def weight_files(folder: Path, variant: str | None = None) -> Iterator[Path]:
    """Yield the safetensors files that diffusers or transformers will read from a component's directory.

    Raises:
        QuantDMError: an index that does not say where the tensors are.
    """
    of = "" if variant is None else f".{variant}"
    for stem in _STEMS:
        index, whole = folder / f"{stem}.safetensors.index{of}.json", folder / f"{stem}{of}.safetensors"
        # an index may be left from an earlier save: transformers reads the whole file then, diffusers the index
        if index.is_file() and not (stem == "model" and whole.is_file()):
            places = read_object(index).get("weight_map")
            if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
                raise QuantDMError(f"{index}: has no `weight_map` from tensors to files; copy or export it again")
            yield from (folder / file for file in sorted(set(places.values())))
        elif whole.is_file():
            yield whole
