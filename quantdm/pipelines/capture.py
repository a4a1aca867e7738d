"""Capture the inputs of a denoiser from one real call of its pipeline."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline

from quantdm.denoisers.example_inputs import to_meta
from quantdm.errors import QuantDMError
from quantdm.pipelines.parts import find_denoisers


class _Captured(Exception):  # noqa: N818 - no error: it ends the pipeline's call early
    """The first call of the last denoiser was seen."""


@torch.no_grad()
def capture_inputs(pipe: DiffusionPipeline, call: Callable[[], object]) -> dict[str, dict[str, Any]]:
    """Return the keyword arguments of the first call of every denoiser, with tensors on the meta device.

    They are what `example_inputs` takes everywhere: component name -> keyword arguments.

    Args:
        pipe: the pipeline; it is left as it was.
        call: runs it, e.g. `lambda: pipe("a cat", num_inference_steps=2)`; it is stopped once all were seen.

    Raises:
        QuantDMError: the call never reached the denoiser.
    """
    denoisers, found, handles = find_denoisers(pipe), {}, []

    def hook(name: str) -> Callable:
        def seen(module: Any, args: tuple, kwargs: dict) -> None:
            if name not in found:
                bound = inspect.signature(module.forward).bind(*args, **kwargs)
                found[name] = {key: to_meta(value) for key, value in bound.arguments.items()}
            if len(found) == len(denoisers):
                raise _Captured

        return seen

    for name, module in denoisers.items():
        handles.append(module.register_forward_pre_hook(hook(name), with_kwargs=True))
    try:
        call()
    except _Captured:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise QuantDMError(
            f"capture_inputs: the call did not run {', '.join(denoisers)}; expected a function that calls this pipeline"
        )
    return found
