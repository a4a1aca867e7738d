"""Try the call of a pipeline before anything long begins: what only the call itself refuses is refused at once."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline
from torch import nn

from quantdm.errors import QuantDMError, counted
from quantdm.pipelines.generate import generate_batches
from quantdm.pipelines.parts import find_denoisers
from quantdm.pipelines.protocol import Protocol

# Pipeline -> calls that it took: a run asks more than once.
_TAKEN: WeakKeyDictionary[DiffusionPipeline, set[tuple[str, str, int]]] = WeakKeyDictionary()


def try_call(pipe: DiffusionPipeline, protocol: Protocol, steps: int) -> None:
    """Make the first image as cheaply as it can be made, and look at what comes out; once for every pipeline.

    A denoiser computes an output once and gives it again at all later steps, so text encoders, scheduler and decoder
    meet everything that they will meet, for the time of one step. Pixels are not looked at: they mean nothing.

    Raises:
        QuantDMError: the pipeline refuses its call, makes no images or videos, or does not call a denoiser at all in
            so few steps.
    """
    taken = _TAKEN.setdefault(pipe, set())
    what = (protocol.model_dump_json(), type(pipe.components.get("scheduler")).__name__, steps)
    if what in taken:
        return
    with once_computed(find_denoisers(pipe)) as called:
        next(generate_batches(pipe, protocol, [0], steps=steps, batch_size=1, any_pixels=True))
    check_called(called, steps)
    taken.add(what)


def check_called(calls: Mapping[str, Any], steps: int) -> None:
    """Check that every denoiser works: `calls` are the number of its calls, or what was recorded of them, by name.

    Raises:
        QuantDMError: names those that do not.
    """
    silent = [name for name, own in calls.items() if not own]
    if silent:
        raise QuantDMError(
            f"{', '.join(silent)}: was never called in {counted(steps, 'step')}; raise the steps of the protocol so "
            "that every denoiser works"
        )


def fewest_steps(pipe: DiffusionPipeline, protocol: Protocol, least: int) -> int:
    """Return the steps with which a pipeline is measured cheaply: `least`, doubled until it works with so few.

    They are never more than the protocol's: pipelines of few steps (LCM, Turbo) are made for these. Pipelines that
    change a picture a little leave most of the steps out, and some need one for every denoiser.

    Raises:
        QuantDMError: it does not work with the protocol's own steps either, see `try_call`.
    """
    try_call(pipe, protocol, protocol.steps)
    least = min(least, protocol.steps)
    while least < protocol.steps:
        try:
            try_call(pipe, protocol, least)
        except QuantDMError:
            least = min(2 * least, protocol.steps)
        else:
            return least
    try_call(pipe, protocol, least)
    return least


@contextmanager
def once_computed(modules: dict[str, nn.Module]) -> Iterator[dict[str, int]]:
    """Let modules compute once for every shape of their inputs while the context is open; count their calls by name."""
    called = dict.fromkeys(modules, 0)
    before = {name: module.__dict__.get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.forward = _remembering(name, module.forward, called)  # pyright: ignore[reportAttributeAccessIssue]
        yield called
    finally:
        for name, module in modules.items():
            if before[name] is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = before[name]  # pyright: ignore[reportAttributeAccessIssue]


def _remembering(name: str, forward: Any, called: dict[str, int]) -> Any:
    """Return a forward that computes once for inputs of a kind; it looks like the one it stands for."""
    known: dict[Any, Any] = {}

    @functools.wraps(forward)
    def remembered(*args: Any, **kwargs: Any) -> Any:
        called[name] += 1
        kind = _kind([args, kwargs])
        if kind not in known:
            known[kind] = forward(*args, **kwargs)
        return known[kind]

    return remembered


def _kind(value: Any) -> Any:
    """Return what outputs of one shape have in common: shapes of tensors, switches, and where they stand."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return tuple((key, _kind(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_kind, value))
    return value if isinstance(value, (bool, str, type(None))) else type(value).__name__
