"""Other values for the parameters of a network while a context is open: made at once and held, or whenever read."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

Make = Callable[[torch.dtype, torch.device], torch.Tensor]


@contextmanager
def pointed(module: nn.Module, *, room: float = math.inf) -> Iterator[Callable[[str, Make], None]]:
    """Yield a function that gives a parameter other values, made in its dtype and on its device, until the end.

    Args:
        module: its parameters are named from there.
        room: bytes of values that are made at once and held. What does not fit any more is made whenever somebody reads
            the parameter, and let go: slower, but a network takes the memory of its own weights only.
    """
    held = 0
    with ExitStack() as stack:

        def point(name: str, make: Make) -> None:
            nonlocal held
            path, _, own = name.rpartition(".")
            owner = module.get_submodule(path)
            parameter = _original(owner, own)
            if held + parameter.nbytes > room or parametrize.is_parametrized(owner, own):
                stack.enter_context(_made_when_read(owner, own, make))
                return
            held += parameter.nbytes
            stack.callback(setattr, parameter, "data", parameter.data)  # two names may share one parameter
            parameter.data = make(parameter.dtype, parameter.device)

        yield point


class _Made(nn.Module):
    """Values in the place of a parameter's own."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make = make

    def forward(self, own: torch.Tensor) -> torch.Tensor:
        return self.make(own.dtype, own.device)


@contextmanager
def _made_when_read(owner: nn.Module, name: str, make: Make) -> Iterator[None]:
    order = list(owner._parameters)
    parametrize.register_parametrization(owner, name, _Made(make), unsafe=True)  # unsafe: values are not made to look
    try:
        yield
    finally:
        if parametrize.is_parametrized(owner, name):  # once for all of a parameter's names
            parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
        for each in order:
            if each in owner._parameters:  # back to its place, which tells in which order a network is read
                owner._parameters[each] = owner._parameters.pop(each)


def _original(owner: nn.Module, name: str) -> torch.Tensor:
    if parametrize.is_parametrized(owner, name):
        return owner.parametrizations[name].original  # pyright: ignore
    return owner.get_parameter(name)
