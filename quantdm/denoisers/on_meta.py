"""What PyTorch refuses on the meta device although only shapes matter there, for the time of one forward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention


@contextmanager
def friendly_to_meta() -> Iterator[None]:
    """Let a forward autocast, build tensors from Python values and use flexible attention on the meta device."""
    changes = ((torch, "autocast", _autocast), (torch, "tensor", _tensor), (flex_attention, "flex_attention", _flex))
    originals = [getattr(owner, name) for owner, name, _ in changes]
    try:
        for (owner, name, make), original in zip(changes, originals, strict=True):
            setattr(owner, name, make(original))
        yield
    finally:
        for (owner, name, _), original in zip(changes, originals, strict=True):
            setattr(owner, name, original)


def _autocast(original: Callable[..., Any]) -> Callable[..., Any]:
    def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == "meta" else original(device_type, *args, **kwargs)

    return autocast


def _tensor(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        # Built on the CPU first: on the meta device the values would be lost before anybody could see them.
        made = original(data, **kwargs)
        return made if device is None else made.to(device)

    return tensor


def _flex(original: Callable[..., Any]) -> Callable[..., Any]:
    def flex(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not query.is_meta:
            return original(query, key, value, *args, **kwargs)
        return scaled_dot_product_attention(query, key, value, enable_gqa=bool(kwargs.get("enable_gqa")))

    return flex
