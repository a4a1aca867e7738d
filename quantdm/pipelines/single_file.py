"""A denoiser in one safetensors file: under diffusers' names, or those of its authors, converted as it is read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from quantdm.errors import QuantDMError
from quantdm.pipelines.exported import exported
from quantdm.pipelines.skeleton import denoiser_config, model_skeleton
from quantdm.pipelines.stored import SUFFIX
from quantdm.pipelines.tensor_files import LazyTensor, tensors_in

_SAY = "say of what kind it is with the configuration of such a denoiser (--config, config=...): the directory of a "
_SAY += "pipeline or of a denoiser, or a config.json"


def open_single_file(path: Path, config: str | Path | None) -> tuple[nn.Module, dict[str, LazyTensor]]:
    """Open a file of weights: the denoiser on the meta device, and its tensors under the names in its state.

    Args:
        path: a safetensors file, of a denoiser alone or of a whole model, whose denoiser is taken.
        config: where its configuration is. Without it: config.json beside the file, if the file has just its tensors;
            else that of the pipeline for which diffusers takes the file, from the hub or its cache.

    Raises:
        QuantDMError: not safetensors, quantized already, or no configuration that its tensors fit.
    """
    if path.suffix != ".safetensors":
        raise QuantDMError(
            f"{path}: expected a .safetensors file; convert it (others can run code when they are opened, or hold "
            "quantized weights)"
        )
    stored = tensors_in([path])
    if any(name.endswith(SUFFIX) for name in stored):
        raise QuantDMError(f"{path}: is a file of an export of quantdm; name its directory to look at it")
    beside = path.parent / "config.json"
    if config is None and beside.is_file():
        model = model_skeleton(denoiser_config(str(beside)), str(beside))
        if model.state_dict().keys() == stored.keys():
            return model, stored
    model = model_skeleton(_config(path, stored, config), str(config or path))
    if model.state_dict().keys() == stored.keys():
        return model, stored
    return model, _converted(path, model, stored)


def _config(path: Path, stored: Mapping[str, LazyTensor], config: str | Path | None) -> dict[str, Any]:
    if config is not None:
        return denoiser_config(str(config))
    try:
        kind = fetch_diffusers_config({name: tensor.meta for name, tensor in stored.items()})
        return denoiser_config(str(kind["pretrained_model_name_or_path"]), kind.get("subfolder"))
    except Exception as error:  # diffusers' guess raises whatever its look-ups raise
        raise QuantDMError(f"{path}: its configuration cannot be found ({error}); {_SAY}") from None


def _converted(path: Path, model: nn.Module, stored: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return the tensors of a file under diffusers' names, by diffusers' own conversion."""
    known = SINGLE_FILE_LOADABLE_CLASSES
    name = next((name for name in known if isinstance(model, exported(name) or ())), None)
    if name is None:
        raise QuantDMError(
            f"{path}: its tensors are not those of a {type(model).__name__}, and diffusers converts no others to it; "
            f"{_SAY}"
        )
    recorded: dict[str, Any] = {key: Recorded(tensor.meta, tensor.read) for key, tensor in stored.items()}
    convert: Callable[..., dict[str, Any]] = known[name]["checkpoint_mapping_fn"]
    try:
        found = convert(checkpoint=recorded, config=dict(model.config))  # pyright: ignore[reportArgumentType, reportCallIssue]
    except QuantDMError:
        raise
    except Exception as error:  # foreign code, which takes what it looks for as given
        raise QuantDMError(
            f"{path}: is no file of a {type(model).__name__} that diffusers converts "
            f"({type(error).__name__}: {error}); {_SAY}"
        ) from None
    return {key: LazyTensor(torch.empty_like(value, device="meta"), value.make) for key, value in found.items()}


class Recorded(torch.Tensor):
    """A tensor of a file with what was done to it: nothing is computed before `make` is called.

    Renaming costs nothing then, and a converted layer (a fused projection in three parts) is read alone.
    """

    make: Callable[[], torch.Tensor]

    @staticmethod
    def __new__(cls, meta: torch.Tensor, make: Callable[[], torch.Tensor]) -> "Recorded":
        """Return a tensor that has the shape and dtype of `meta` and the values that `make` returns."""
        made = torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=torch.device("meta")
        )
        made.make = make
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note an operation; its result has the right shape and can be made later."""
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            raise QuantDMError(f"{func}: changes a tensor of the file in place, which cannot be put off")
        empty = tree_map_only(
            Recorded, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), (args, kwargs)
        )
        results, shape = tree_flatten(func(*empty[0], **empty[1]))

        def make(position: int) -> torch.Tensor:
            real = tree_map_only(Recorded, lambda tensor: tensor.make(), (args, kwargs))
            return tree_flatten(func(*real[0], **real[1]))[0][position]

        wrapped = [
            Recorded(value, lambda position=i: make(position)) if isinstance(value, torch.Tensor) else value
            for i, value in enumerate(results)
        ]
        return tree_unflatten(wrapped, shape)
