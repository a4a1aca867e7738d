"""A pipeline or a lone denoiser as it lies on disk: networks on the meta device, their tensors read when asked for."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from quantdm.errors import QuantDMError
from quantdm.pipelines.known import known_pipelines, pipeline_path
from quantdm.pipelines.loading import fetch_pipeline, open_files, unopened
from quantdm.pipelines.single_file import open_single_file
from quantdm.pipelines.skeleton import model_skeleton, part_skeleton
from quantdm.pipelines.stored import METHOD, check_stored, read_object, stored_variant, weight_files
from quantdm.pipelines.tensor_files import LazyTensor, tensors_in


@dataclass(frozen=True)
class StoredPart:
    """The weights of one network on disk.

    Args:
        tensors: name in the network's state -> tensor.
        names: name in the state -> name in the files, where transformers reads it under another one.
        folder: that holds config and weights; None for a single file.
        files: the weights.
        variant: in the names of the files.
    """

    tensors: dict[str, LazyTensor]
    names: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    files: tuple[Path, ...] = ()
    variant: str | None = None


@dataclass(frozen=True)
class Source:
    """What a name stands for, opened without its weights.

    Args:
        name: as it was given.
        pipe: a pipeline, or a lone denoiser; networks in `parts` are on the meta device, others are loaded.
        parts: component name ("" for a lone denoiser) -> its weights.
        path: of the pipeline, the denoiser or the file.
    """

    name: str
    pipe: Any
    parts: dict[str, StoredPart]
    path: Path

    @property
    def models(self) -> dict[str, nn.Module]:
        """Component name ("" for a lone denoiser) -> network."""
        if isinstance(self.pipe, nn.Module):
            return {"": self.pipe}
        return {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}


def open_source(
    name_or_path: str | Path,
    *,
    variant: str | None = None,
    config: str | Path | None = None,
    only_look: bool = False,
) -> Source:
    """Open a pipeline, a denoiser's folder or a single safetensors file; only configurations and headers are read.

    Components that are not stored as safetensors, or under other names than their class has, are loaded.

    Args:
        name_or_path: an embedded pipeline, the directory of a pipeline (also a snapshot of the hub's cache) or of a
            denoiser, a safetensors file of one, or a hub id OWNER/NAME, which is fetched.
        variant: of the weights, e.g. "fp16" (None: the ordinary files, or the only variant in a directory that has no
            others).
        config: of the denoiser in a single file: the directory of a pipeline or of a denoiser, or a config.json.
        only_look: leave also networks that quantdm quantized on the meta device, unpacked and without tensors.

    Raises:
        QuantDMError: nothing there, damaged, several variants and no ordinary files, or a file whose configuration is
            not known.
    """
    path = local_path(name_or_path)
    if os.path.isfile(path):
        model, tensors = open_single_file(path, config)
        check_fits(model, tensors, str(path))
        return Source(str(name_or_path), model, {"": StoredPart(tensors, files=(path,))}, path)
    if config is not None:
        raise QuantDMError(f"config: goes with a single safetensors file, and {name_or_path} is none; leave it out")
    if is_lone(path):
        return _open_denoiser(str(name_or_path), path, variant, only_look)
    folder = fetch_pipeline(pipeline_path(name_or_path), variant)
    variant = variant or stored_variant(folder)
    check_stored(folder, variant)
    pipe, parts = _open_pipeline(str(name_or_path), folder, variant, only_look=only_look)
    return Source(str(name_or_path), pipe, parts, folder)


def local_path(name_or_path: str | Path) -> Path:
    """Return where a name lies on this disk, if it does: an embedded pipeline comes before a file of the same name."""
    name = str(name_or_path)
    return Path(pipeline_path(name)) if name in known_pipelines() else Path(name).expanduser()


def is_lone(name_or_path: str | Path) -> bool:
    """Tell whether a name stands for a denoiser without a pipeline: its folder, or a file."""
    path = local_path(name_or_path)
    return os.path.isfile(path) or (
        os.path.isfile(path / "config.json") and not os.path.isfile(path / "model_index.json")
    )


def _open_denoiser(name: str, folder: Path, variant: str | None, only_look: bool) -> Source:
    files = _files(folder, variant or stored_variant(folder))
    record = read_object(folder / "config.json")
    quantized = _quantized_by(record)
    if quantized is not None and not (only_look and quantized == METHOD):
        raise QuantDMError(f"{folder}: is quantized already ({quantized}); give the original")
    if not files:
        raise QuantDMError(
            f"{folder}: has a config.json, but no diffusion_pytorch_model.safetensors{_told(variant)} beside it; "
            "convert its weights to safetensors (save_pretrained), or name another folder"
        )
    model: Any = model_skeleton(record, str(folder))
    model.register_to_config(_name_or_path=str(folder))
    tensors = {} if quantized else tensors_in(files)
    if not quantized:
        check_fits(model, tensors, str(folder))
    return Source(name, model, {"": StoredPart(tensors, {}, folder, files)}, folder)


def _quantized_by(config: Mapping[str, Any]) -> str | None:
    """Return the method that a configuration says its weights were quantized with."""
    settings = config.get("quantization_config")
    return str(settings.get("quant_method", "unknown")) if isinstance(settings, Mapping) else None


def check_fits(model: nn.Module, tensors: Mapping[str, LazyTensor], where: str) -> None:
    """Check that tensors are those of a model's state.

    Raises:
        QuantDMError: names the first that is missing, of another shape, or that nothing asks for.
    """
    reason = _why_not(model, tensors)
    if reason is not None:
        raise QuantDMError(f"{where}: its weights are not those of a {type(model).__name__}: {reason}")


def _why_not(model: nn.Module, tensors: Mapping[str, LazyTensor]) -> str | None:
    state = model.state_dict()
    for key, tensor in state.items():
        if key not in tensors:
            return f"{key} is missing"
        if tensors[key].meta.shape != tensor.shape:
            return f"{key} is {tuple(tensors[key].meta.shape)}, expected {tuple(tensor.shape)}"
    extra = next((key for key in tensors if key not in state), None)
    return None if extra is None else f"nothing asks for {extra}"


def _open_pipeline(
    name: str, folder: Path, variant: str | None, *, only_look: bool
) -> tuple[DiffusionPipeline, dict[str, StoredPart]]:
    skeletons, parts = {}, {}
    for part, entry in read_object(folder / "model_index.json").items():
        where = folder / part
        if part.startswith("_") or not isinstance(entry, list) or not (where / "config.json").is_file():
            continue
        quantized = _quantized_by(read_object(where / "config.json"))
        if quantized is None or (only_look and quantized == METHOD):
            found = _open_part(entry, where, variant, is_packed=quantized is not None)
            if found is not None:
                skeletons[part], parts[part] = found
    try:
        pipe = open_files(folder, variant, torch.float32, skeletons)
    except QuantDMError:
        raise
    except Exception as error:  # diffusers raises whatever its readers raise
        raise unopened(name, error) from error
    return pipe, parts


def _open_part(
    entry: list[Any], folder: Path, variant: str | None, *, is_packed: bool
) -> tuple[nn.Module, StoredPart] | None:
    """Return the skeleton of a network and its tensors; None where it has to be loaded to know them."""
    files = _files(folder, variant)
    try:
        cls = simple_get_class_obj(*entry)
    except (AttributeError, ImportError, TypeError, ValueError):  # custom code beside the weights
        return None
    if not files or not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        return None
    stored = tensors_in(files)
    floats = [tensor.meta.dtype for tensor in stored.values() if tensor.meta.is_floating_point()]
    model = part_skeleton(cls, folder, max(set(floats), key=floats.count) if floats else torch.float32)
    if is_packed:
        return model, StoredPart({}, {}, folder, files, variant)
    names = _names_in_files(model, stored) if isinstance(model, PreTrainedModel) else {key: key for key in stored}
    if names is None:
        return None
    tensors = {key: stored[name] for key, name in names.items()}
    for key, twin in getattr(model, "all_tied_weights_keys", {}).items():  # the files hold one of the two
        pair = [tensors[name] for name in (key, twin) if name in tensors]
        tensors |= {name: pair[0] for name in (key, twin) if pair and name not in tensors}
    if _why_not(model, tensors) is not None:
        return None
    own = variant if variant and any(f".{variant}" in file.name for file in files) else None
    return model, StoredPart(tensors, names, folder, files, own)


def _names_in_files(model: PreTrainedModel, stored: Mapping[str, LazyTensor]) -> dict[str, str] | None:
    """Return name in the state -> name in the files, as transformers reads them; None where it computes tensors."""
    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters: list[Any] = [entry for entry in transforms if not isinstance(entry, WeightRenaming)]
    found: dict[str, str] = {}
    for name in stored:
        key, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if key not in state:
            continue  # transformers does not read it either
        if converted is not None or key in found:
            return None
        found[key] = name
    return {key: found[key] for key in state if key in found}


def _files(folder: Path, variant: str | None) -> tuple[Path, ...]:
    return tuple(weight_files(folder, variant)) or tuple(weight_files(folder))


def _told(variant: str | None) -> str:
    return "" if variant is None else f" (nor of the variant {variant})"
