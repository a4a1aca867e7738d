"""A model without its weights: built on the meta device from class and configuration, wherever they are stored."""

import os
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from quantdm.errors import QuantDMError
from quantdm.pipelines.exported import exported
from quantdm.pipelines.known import known_pipelines, pipeline_path
from quantdm.pipelines.parts import DENOISER_NAMES
from quantdm.pipelines.stored import read_object


def open_skeleton(name_or_path: str | Path) -> nn.Module:
    """Return the denoiser of a pipeline on the meta device; only its configuration is read, or fetched.

    Args:
        name_or_path: an embedded pipeline, a directory of a pipeline or of a denoiser, a denoiser's config.json, or a
            hub id OWNER/NAME.

    Raises:
        QuantDMError: nothing there, no denoiser in it, or a class that diffusers has not.
    """
    return model_skeleton(denoiser_config(str(name_or_path)), str(name_or_path))


def model_skeleton(config: dict[str, Any], where: str) -> ModelMixin:
    """Return a diffusers model on the meta device, as its configuration describes it; `where` names it in messages.

    Raises:
        QuantDMError: a class that diffusers has not.
    """
    name = str(config.get("_class_name"))
    cls = exported(name)
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise QuantDMError(
            f"{where}: its denoiser is a {name}, which diffusers {diffusers.__version__} has not, or cannot import "
            "with what is installed here"
        )
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return cls.from_config(config).to("meta").eval()  # pyright: ignore[reportAttributeAccessIssue]


def part_skeleton(cls: type, folder: Path, dtype: torch.dtype) -> Any:
    """Return a component of a pipeline on the meta device, as `from_pretrained` of its folder would describe it.

    Args:
        cls: a class of diffusers or transformers.
        folder: of the component.
        dtype: of its weights, which transformers writes into the configuration.

    Raises:
        QuantDMError: a class of neither library.
    """
    if issubclass(cls, ModelMixin):
        found: Any = model_skeleton(read_object(folder / "config.json"), str(folder))
        found.register_to_config(_name_or_path=str(folder))  # as from_pretrained does
        return found
    if not issubclass(cls, PreTrainedModel) or cls.config_class is None:
        raise QuantDMError(f"{folder}: got a {cls.__name__}, expected a model of diffusers or transformers")
    config = cls.config_class.from_pretrained(str(folder))
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model: Any = cls._from_config(config, dtype=dtype)
    model.to("meta").eval()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return model


def denoiser_config(name: str, part: str | None = None) -> dict[str, Any]:
    """Return the configuration of a denoiser (see `open_skeleton`); `part` is its component, if it is known."""
    path = Path(name).expanduser()
    if os.path.isfile(path):
        return read_object(path)
    if os.path.isfile(path / "config.json") and not os.path.isfile(path / "model_index.json"):
        return read_object(path / "config.json")
    where = pipeline_path(name)
    index = read_object(_file(where, "model_index.json"))
    names = DENOISER_NAMES if part is None else (part,)
    part = next((part for part in names if isinstance(index.get(part), list) and index[part][0]), None)
    if part is None:
        raise QuantDMError(f"{name}: its pipeline has no denoiser ({', '.join(DENOISER_NAMES)})")
    return read_object(_file(where, f"{part}/config.json"))


def _file(where: str, file: str) -> Path:
    if os.path.isdir(where):
        return Path(where) / file
    try:
        return Path(hf_hub_download(where, file))
    except Exception as error:  # the hub client raises whatever its network raises
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise QuantDMError(
            f"{where}: {file} cannot be fetched from the hub ({first[:120]}); name a directory of it or its "
            f"denoiser's config.json (--model), or an embedded pipeline ({', '.join(known_pipelines())})"
        ) from None
