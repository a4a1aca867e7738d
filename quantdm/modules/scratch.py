"""A buffer that is used again by every layer that decodes its weight on a CPU."""

import threading
from typing import Any

import torch

_scratch = threading.local()


def scratch_out(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
    """Return a reusable CPU buffer: fresh large temporaries cost page faults (docs/method.md, Running).

    Only without autograd, which would keep the weight for the backward pass, and never between inference modes.
    """
    if torch.is_grad_enabled():
        return None
    key = (dtype, torch.is_inference_mode_enabled())
    buffers: dict[Any, torch.Tensor] = _scratch.__dict__.setdefault("buffers", {})
    count = torch.Size(shape).numel()
    if key not in buffers or buffers[key].numel() < count:
        buffers[key] = torch.empty(count, dtype=dtype)
    return buffers[key][:count].view(shape)
