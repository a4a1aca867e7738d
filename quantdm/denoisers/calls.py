"""Record the calls of a denoiser while a pipeline runs, and replay them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Call:
    """One recorded denoiser forward: its inputs and its output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor


@dataclass
class Recording:
    """The denoiser calls of one generation, at the wanted steps."""

    calls: list[Call] = field(default_factory=list)
    seen: int = 0


@contextmanager
def record_calls(denoiser: nn.Module, steps: Sequence[int] | None = None) -> Iterator[Recording]:
    """Record the denoiser's calls while the context is open (only those with an index in `steps`, if given)."""
    recording = Recording()

    def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if steps is None or recording.seen in steps:
            recording.calls.append(Call(args, kwargs, first_tensor(output).detach().clone()))
        recording.seen += 1

    handle = denoiser.register_forward_hook(hook, with_kwargs=True)
    try:
        yield recording
    finally:
        handle.remove()


def first_tensor(output: Any) -> torch.Tensor:
    """Return the noise prediction of a denoiser's output, whatever its container."""
    return output if isinstance(output, torch.Tensor) else output[0]


@torch.no_grad()
def replay(denoiser: nn.Module, calls: Sequence[Call]) -> list[torch.Tensor]:
    """Run a denoiser on recorded inputs and return its outputs."""
    return [first_tensor(denoiser(*call.args, **call.kwargs)) for call in calls]


@contextmanager
def scoped(model: nn.Module, scope: list[str]) -> Iterator[None]:
    """Keep in `scope` the names of the modules that are running, the innermost last."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _m, _a, name=name: scope.append(name)))
        handles.append(module.register_forward_hook(lambda _m, _a, _o: (scope.pop(), None)[1], always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
