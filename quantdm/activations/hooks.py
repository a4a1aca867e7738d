"""Activation quantization of any denoiser, quantized or not, with hooks that come off again.

Simulated ("fake") quantization: values are rounded to the integer grid and returned as floats. A packed layer in
`integer` residency is handed the integers themselves.
"""

import inspect
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch
from torch import nn

from quantdm.activations.attention import QuantizedAttention
from quantdm.activations.equalisers import given_exponents
from quantdm.activations.handover import input_for
from quantdm.denoisers.calls import layer_input, with_input
from quantdm.denoisers.inventory import LayerRecord, list_layers
from quantdm.errors import QuantDMError, check_kind
from quantdm.recipe import ActivationScheme, ActivationSpec

_STATE = "_quantdm_activations"


@dataclass(frozen=True)
class _State:
    spec: ActivationSpec
    handles: tuple[Any, ...]


class _Clock:
    """Forward pre-hook of the denoiser: in which bucket of timesteps it runs now."""

    def __init__(self, denoiser: nn.Module, buckets: tuple[float, ...]) -> None:
        self.bucket = 0
        self._buckets = [-t for t in buckets]  # ascending
        self._timestep_of = timestep_reader(denoiser)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        at = self._timestep_of(args, kwargs)
        if at is None:
            raise QuantDMError("activations: ranges per bucket of timesteps, but the denoiser was called without one")
        self.bucket = bisect_left(self._buckets, -at)


def timestep_reader(denoiser: nn.Module) -> Callable[[tuple[Any, ...], Mapping[str, Any]], float | None]:
    """Return what finds the (largest) timestep in the arguments of a denoiser's call, or None."""
    names = list(inspect.signature(denoiser.forward).parameters)
    index = names.index("timestep") if "timestep" in names else None

    def timestep_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float | None:
        value = kwargs.get("timestep")
        if value is None and index is not None and index < len(args):
            value = args[index]
        return None if value is None else float(torch.as_tensor(value).float().max())

    return timestep_of


@dataclass(frozen=True)
class _QuantizeInput:
    """Forward pre-hook: quantize the input of a layer, to integers where the layer multiplies them."""

    record: LayerRecord
    scheme: ActivationScheme
    ranges: tuple[tuple[float, float], ...] = ()
    clock: _Clock | None = field(default=None, compare=False)
    spec: ActivationSpec | None = field(default=None, compare=False)  # where bits change from step to step
    exponents: torch.Tensor | None = field(default=None, compare=False)  # of an equalised scheme, from the spec

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = layer_input(self.record.name, args, kwargs)
        scheme = in_bucket(self.spec, self.scheme, self.clock)
        if scheme is None:
            return args, kwargs
        return with_input(args, kwargs, input_for(module, x, self.record, scheme, self._given(), self.exponents))

    def _given(self) -> tuple[float, float] | None:
        return self.ranges[self.clock.bucket if self.clock else 0] if self.scheme.static else None


def in_bucket(
    spec: ActivationSpec | None, scheme: ActivationScheme | None, clock: _Clock | None
) -> ActivationScheme | None:
    """Return a scheme as it is at the timestep that the denoiser runs at; None: nothing is quantized there."""
    return scheme if spec is None else spec.in_bucket(scheme, clock.bucket if clock else 0)


def set_activation_bits_(denoiser: nn.Module, spec: ActivationSpec | None) -> None:
    """Quantize the inputs of Linear and Conv layers, and attention, while the denoiser runs; None switches it off.

    Setting replaces what was set before; None removes every hook.

    Raises:
        QuantDMError: a rule of `spec` matches nothing, a static scheme has no ranges, an equalised one no equaliser, or
            that of another layer; nothing is changed then.
    """
    check_kind(spec, (ActivationSpec, NoneType), "spec", "give an ActivationSpec, such as usual_activations(model, 6)")
    records = () if spec is None else list_layers(denoiser)
    schemes = {} if spec is None else spec.resolve(records)
    exponents = {} if spec is None else given_exponents(denoiser, spec, records, schemes)
    state: _State | None = denoiser.__dict__.pop(_STATE, None)
    for handle in state.handles if state else ():
        handle.remove()
    if spec is None:
        return
    handles: list[Any] = []
    clock = _Clock(denoiser, spec.buckets) if spec.buckets else None
    if clock is not None:
        handles.append(denoiser.register_forward_pre_hook(clock, with_kwargs=True))
    for record in records:
        scheme = schemes[record.name]
        if scheme is not None:
            ranges = spec.ranges.get(record.name, ())
            hook = _QuantizeInput(record, scheme, ranges, clock, spec, exponents.get(record.name))
            handles.append(denoiser.get_submodule(record.name).register_forward_pre_hook(hook, with_kwargs=True))
    if spec.attention is not None or spec.probabilities is not None:
        handles += _inside_attention(denoiser, spec, clock)
    denoiser.__dict__[_STATE] = _State(spec, tuple(handles))


class _Attention:
    """A pair of hooks of the denoiser between which its attention is quantized."""

    def __init__(self, spec: ActivationSpec, clock: _Clock | None) -> None:
        self._spec, self._clock = spec, clock
        self._operands = None if spec.attention is None else ActivationScheme.parse(spec.attention)
        self._active: list[QuantizedAttention] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        operands = in_bucket(self._spec, self._operands, self._clock)
        probabilities = self._spec.probabilities_in(self._clock.bucket if self._clock else 0)
        mode = QuantizedAttention(operands, probabilities)
        mode.__enter__()
        self._active.append(mode)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._active:
            self._active.pop().__exit__(None, None, None)


def _inside_attention(denoiser: nn.Module, spec: ActivationSpec, clock: _Clock | None) -> list[Any]:
    hooks = _Attention(spec, clock)
    return [
        denoiser.register_forward_pre_hook(hooks.enter),
        denoiser.register_forward_hook(hooks.leave, always_call=True),
    ]


def activation_spec(denoiser: nn.Module) -> ActivationSpec | None:
    """Return what `set_activation_bits_` last set on this denoiser."""
    state: _State | None = denoiser.__dict__.get(_STATE)
    return state.spec if state else None
