"""Encode every prompt batch once: text encoders that remember their outputs by everything they were given."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn

# Where accelerate keeps what its hooks wrap. It outlives their being taken off and put on again after every call of an
# offloaded pipeline, while `forward` does not.
UNDER_HOOKS = "_old_forward"


@contextmanager
def memoized_text_encoders(pipe: DiffusionPipeline) -> Iterator[None]:
    """Encode every prompt batch once while the context is open; hooks of accelerate and diffusers stay as they were."""
    encoders = [m for n, m in pipe.components.items() if n.startswith("text_encoder") and isinstance(m, nn.Module)]
    undo = [_remember(encoder) for encoder in encoders]
    try:
        yield
    finally:
        for restore in reversed(undo):
            restore()


def _remember(encoder: nn.Module) -> Callable[[], None]:
    """Put a remembering function in the place of an encoder's own; return what puts the own one back."""
    place = UNDER_HOOKS if UNDER_HOOKS in vars(encoder) else "forward"
    was_there = place in vars(encoder)
    original = getattr(encoder, place)
    memory: dict[Any, Any] = {}
    remembering = _memoize(original, memory)
    setattr(encoder, place, remembering)

    def restore() -> None:
        memory.clear()  # a hook that was put on meanwhile may go on knowing the function
        for name in ("forward", UNDER_HOOKS):
            if vars(encoder).get(name) is not remembering:
                continue
            if name == "forward" and not was_there:
                del encoder.forward  # the class's own shows again
            else:
                setattr(encoder, name, original)

    return restore


def _memoize(forward: Callable, memory: dict[Any, Any]) -> Callable:
    @functools.wraps(forward)
    def remembering(*args: Any, **kwargs: Any) -> Any:  # stands in for any text encoder
        try:
            key = _key((args, kwargs))
        except TypeError:  # something whose content is not seen: nothing may be taken for its equal
            return forward(*args, **kwargs)
        if key not in memory:
            memory[key] = forward(*args, **kwargs)
        return copy.deepcopy(memory[key])  # a pipeline may change what it is given

    return remembering


def _key(value: Any) -> Any:
    """Return what determines an argument, to the last element.

    Raises:
        TypeError: a kind of value whose content is not known.
    """
    if isinstance(value, torch.Tensor) and not value.is_meta:
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return ("tensor", str(value.dtype), str(value.device), tuple(value.shape), content)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return ("array", str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, dict):
        return ("dict", tuple((name, _key(item)) for name, item in sorted(value.items())))
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, tuple(_key(item) for item in value))
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        return (type(value).__name__, value)
    raise TypeError(f"no key for {type(value).__name__}")
