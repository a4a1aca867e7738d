"""Example inputs of a denoiser, from its forward's signature and its configuration, tried out on the meta device."""

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, nn

from quantdm.denoisers.constants import MAX_ELEMENTS, map_tensors
from quantdm.denoisers.shapes import choices_of
from quantdm.denoisers.trace import ForwardError, Trace, trace_forward
from quantdm.errors import QuantDMError

TRIALS = 100  # forwards, most of which end at one of the first layers
# The remedy of every error of tracing; all doors that it names take them.
GIVE_INPUTS = (
    "give the keyword arguments of one call of the denoiser (values do not matter): example_inputs={...} of "
    "list_layers, trace_graph, apply_recipe, search and QuantDMConfig, --example-inputs FILE on the command line, or "
    "what quantdm.capture_inputs(pipe, call) returns"
)
Inputs = dict[str, Any]


def find_inputs(
    model: nn.Module, config: Mapping[str, Any], run: Callable[[nn.Module, Inputs], Trace] = trace_forward
) -> tuple[Inputs, Trace]:
    """Return keyword arguments with which a weightless denoiser runs, and the trace of that forward.

    What an argument may look like follows from its name and the configuration (`input_rules`). Where the call with the
    likeliest shapes fails, one or two arguments at a time are changed to what lets the forward come further.

    Args:
        model: a denoiser on the meta device.
        config: its configuration.
        run: traces one forward, or raises `ForwardError`.

    Returns:
        inputs: floating point tensors on the meta device (batch of two); masks, ids and positions with values.

    Raises:
        QuantDMError: a required argument whose shape cannot be told, or no choice with which the forward runs.
    """
    choices, missing = choices_of(model, config)
    if missing:
        raise QuantDMError(
            f"{type(model).__name__}: cannot infer example inputs for {', '.join(missing)}; expected arguments whose "
            f"shapes follow from the configuration; {GIVE_INPUTS}"
        )
    steps: Iterator[tuple[int, ...]] = iter([(0,) * len(choices)])
    seen: set[tuple[int, ...]] = set()
    best: tuple[Inputs, ForwardError] | None = None
    while len(seen) < TRIALS and (step := next(steps, None)) is not None:
        if step in seen:
            continue
        seen.add(step)
        picked = {name: values[i] for (name, values), i in zip(choices.items(), step, strict=True)}
        inputs = {name: value for name, value in picked.items() if value is not None}
        try:
            return inputs, run(model, inputs)
        except ForwardError as error:
            if best is None or error.reached > best[1].reached:
                best, steps = (inputs, error), _neighbours(step, [len(values) for values in choices.values()])
    assert best is not None
    raise failure(model, *best) from best[1].__cause__


def infer_inputs(model: nn.Module, config: Mapping[str, Any]) -> Inputs:
    """Return what `find_inputs` finds for a denoiser on any device."""
    return find_inputs(meta_copy(model, config), config)[0]


def meta_copy(denoiser: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """Return a weightless copy of a diffusers model, made from its class and configuration, in eval mode."""
    # forked: constants that the constructor draws must not move the caller's random state
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        copy = type(denoiser).from_config(dict(config))  # pyright: ignore[reportAttributeAccessIssue]
    return copy.to("meta").eval()


def failure(model: nn.Module, inputs: Mapping[str, Any], error: ForwardError) -> QuantDMError:
    """Return the error of a forward that failed with these inputs."""
    reason = " ".join(f"{type(error.__cause__).__name__}: {error.__cause__}".split())
    return QuantDMError(
        f"{type(model).__name__}: its forward fails on the meta device with inputs {signature(inputs)}: {reason}; "
        f"{GIVE_INPUTS}"
    )


def to_meta(value: Any) -> Any:
    """Return given example inputs with floating point tensors on the meta device, in the default dtype.

    Masks, ids and positions are small, and some denoisers read them: they keep their values, on the CPU.
    """

    def change(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return tensor.to("meta", torch.get_default_dtype())
        return tensor.detach().to("meta" if tensor.is_meta or tensor.numel() > MAX_ELEMENTS else "cpu")

    return map_tensors(value, change)


def signature(value: Any) -> Any:
    """Return example inputs as plain values that tell dtypes and shapes."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, Mapping):
        return {str(k): signature(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [signature(v) for v in value]
    return str(value)


def _neighbours(step: tuple[int, ...], sizes: list[int]) -> Iterator[tuple[int, ...]]:
    """Yield the choices that differ from this one in one argument, then in two."""
    for count in (1, 2):
        for places in combinations([i for i, size in enumerate(sizes) if size > 1], count):
            for values in product(*(range(sizes[i]) for i in places)):
                if all(step[i] != value for i, value in zip(places, values, strict=True)):
                    changed = list(step)
                    for i, value in zip(places, values, strict=True):
                        changed[i] = value
                    yield tuple(changed)
