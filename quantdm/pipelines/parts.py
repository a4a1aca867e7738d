"""Which parts of a pipeline are its denoisers: found by what they take, not by a list of classes."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from quantdm.errors import QuantDMError

DENOISER_NAMES = ("unet", "transformer", "prior")  # where pipelines have their denoiser, the main one first
_TIME = {"timestep", "timesteps", "timestep_ratio", "t", "r"}  # a network that takes the time denoises ...
_CONTROL = {"controlnet_cond", "conditioning_scale"}  # ... unless it only steers another one


def find_denoisers(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return the denoisers of a pipeline by component name, the main one first; most pipelines have one.

    Wan 2.2 has two transformers (one per range of noise levels), Kandinsky's combined pipelines a prior and a U-Net.
    ControlNets are none.

    Raises:
        QuantDMError: the pipeline has none.
    """
    if not isinstance(pipe, DiffusionPipeline) and not hasattr(pipe, "components"):
        raise QuantDMError(
            f"pipeline: got {pipe if isinstance(pipe, (str, Path)) else f'a {type(pipe).__name__}'}, expected a "
            "pipeline, such as quantdm.load_pipeline(name or path) opens"
        )
    found = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module) and _denoises(part)}
    order = sorted(found, key=lambda name: [*DENOISER_NAMES, name].index(name))
    if not order:
        raise QuantDMError(
            f"{type(pipe).__name__} has no denoiser (a network that takes a timestep, such as `unet` or "
            f"`transformer`); its components are {', '.join(pipe.components)}"
        )
    return {name: found[name] for name in order}


def get_denoiser(pipe: DiffusionPipeline | nn.Module) -> nn.Module:
    """Return the U-Net or transformer of a pipeline, the main one if it has several (a module is returned as it is).

    Raises:
        QuantDMError: the pipeline has none.
    """
    return pipe if isinstance(pipe, nn.Module) else next(iter(find_denoisers(pipe).values()))


def inputs_by_part(pipe: Any, given: Mapping[str, Any] | None) -> list[tuple[nn.Module, Mapping[str, Any]]]:
    """Return the denoisers for which example inputs were given, each with its own.

    `given` are the keyword arguments of one call of the main denoiser, or component name -> keyword arguments.
    """
    if given is None:
        return []
    denoisers = {"": pipe} if isinstance(pipe, nn.Module) else find_denoisers(pipe)
    if set(given) <= set(denoisers) and all(isinstance(value, Mapping) for value in given.values()):
        return [(denoisers[name], inputs) for name, inputs in given.items()]
    return [(next(iter(denoisers.values())), given)]


def _denoises(part: nn.Module) -> bool:
    taken = inspect.signature(getattr(part, "_orig_mod", part).forward).parameters.keys()
    return bool(taken & _TIME) and not taken & _CONTROL
