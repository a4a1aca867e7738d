"""Record the calls of a denoiser while a pipeline runs, and replay them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from quantdm.errors import QuantDMError


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

    def mark(self) -> Callable[[], None]:
        """Return what takes back all that is recorded from now on."""
        calls, seen = len(self.calls), self.seen

        def take_back() -> None:
            del self.calls[calls:]
            self.seen = seen

        return take_back


# Denoiser -> what marks the place of each recording of it that is open now.
_OPEN: WeakKeyDictionary[nn.Module, list[Callable[[], Callable[[], None]]]] = WeakKeyDictionary()


@contextmanager
def taken_back(denoisers: Iterable[nn.Module], mark: Callable[[], Callable[[], None]]) -> Iterator[None]:
    """Let what is recorded of some denoisers be taken back while the context is open; `mark` as of `Recording`."""
    opened = [_OPEN.setdefault(denoiser, []) for denoiser in denoisers]
    for each in opened:
        each.append(mark)
    try:
        yield
    finally:
        for each in opened:
            each.remove(mark)


def mark_recordings(denoisers: Iterable[nn.Module]) -> Callable[[], None]:
    """Return what makes every recording forget the call that begins now: it ran out of memory and is made anew."""
    marks = {id(mark): mark for denoiser in denoisers for mark in _OPEN.get(denoiser, ())}
    undo = [mark() for mark in marks.values()]

    def take_back() -> None:
        for each in undo:
            each()

    return take_back


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
        with taken_back([denoiser], recording.mark):
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


def layer_input(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return what a Linear or Conv layer was called with; some networks (AnimateDiff's) name it.

    Raises:
        QuantDMError: a call of another kind.
    """
    if not args and "input" not in kwargs:
        raise QuantDMError(f"{name}: was called with {', '.join(kwargs) or 'nothing'}, expected its input first")
    return args[0] if args else kwargs["input"]


def with_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of such a call with another input."""
    return ((x, *args[1:]), dict(kwargs)) if args else (args, {**kwargs, "input": x})


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
