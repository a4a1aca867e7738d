"""Other values for the parameters of a network while a context is open: made at once and held, or whenever read."""

import math
from collections import Counter
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
            the parameter, and let go: slower, but a network takes the memory of its own weights only. Parameters of
            several names, and those of the module itself, are held in any case: others read them elsewhere.
    """
    names = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    held = 0
    with ExitStack() as stack:

        def point(name: str, make: Make) -> None:
            nonlocal held
            parameter, (path, _, own) = module.get_parameter(name), name.rpartition(".")
            if held + parameter.nbytes > room and path and names[id(parameter)] == 1:
                stack.enter_context(_made_when_read(module.get_submodule(path), own, make))
                return
            held += parameter.nbytes
            stack.callback(setattr, parameter, "data", parameter.data)
            parameter.data = make(parameter.dtype, parameter.device)

        yield point


class _Made(nn.Module):
    """Values in the place of a parameter's own."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make = make

    def forward(self, own: torch.Tensor) -> torch.Tensor:
        try:
            return self.make(own.dtype, own.device)
        except AttributeError as error:  # of a property, Python would say that the property is not there
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


@contextmanager
def _made_when_read(owner: nn.Module, name: str, make: Make) -> Iterator[None]:
    order = list(owner._parameters)
    parametrize.register_parametrization(owner, name, _Made(make), unsafe=True)  # unsafe: values are not made to look
    try:
        yield
    finally:
        parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
        for each in order:
            owner._parameters[each] = owner._parameters.pop(each)  # in its old place: networks are read in this order
