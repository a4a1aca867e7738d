"""A copy of a pipeline in another dtype, so that one that was opened once serves in two."""

import copy
from itertools import chain

import torch
from diffusers import DiffusionPipeline
from torch import nn


def in_dtype(pipe: DiffusionPipeline, dtype: torch.dtype) -> DiffusionPipeline:
    """Return a pipeline like this one whose networks compute in `dtype`; the original stays as it is.

    Modules that a network keeps in float32, as `from_pretrained` does, stay there.
    """
    other = copy.copy(pipe)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            setattr(other, name, cast_(copy.deepcopy(part), dtype))
        elif part is not None and hasattr(part, "set_timesteps"):
            setattr(other, name, copy.deepcopy(part))  # schedulers keep state
    return other


def cast_(part: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a network in place, but for the modules that `from_pretrained` keeps in float32; return it."""
    kept = {*(getattr(part, "_keep_in_fp32_modules_strict", None) or ())}
    if dtype == torch.float16 or not hasattr(part, "_keep_in_fp32_modules_strict"):  # as the two libraries have it
        kept |= {*(getattr(part, "_keep_in_fp32_modules", None) or ())}
    for name, tensor in chain(part.named_parameters(), part.named_buffers()):
        if tensor.is_floating_point() and not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return part
