"""Dynamic activation quantization of any denoiser, quantized or not, with hooks that come off again.

Simulated ("fake") quantization: values are rounded to the integer grid and returned as floats. Softmax probabilities
stay in floating point: fused attention kernels never show them.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from quantdm.activations.bits import layer_bits
from quantdm.activations.rounding import fake_quantize
from quantdm.denoisers.inventory import list_layers
from quantdm.errors import QuantDMError
from quantdm.recipe import ActivationSpec

# Projections whose outputs are the operands of an attention product (diffusers' and transformers' names).
_ATTENTION_OPERANDS = (
    "*to_q",
    "*to_k",
    "*to_v",
    "*to_qkv",
    "*to_kv",
    "*add_[qkv]_proj",
    "*[qkv]_proj",
    "*query",
    "*key",
    "*value",
)
_STATE = "_quantdm_activations"


@dataclass(frozen=True)
class _State:
    spec: ActivationSpec
    handles: tuple[Any, ...]


@dataclass(frozen=True)
class _QuantizeInput:
    """Forward pre-hook: quantize the first argument of a layer."""

    name: str
    bits: int
    dims: int | tuple[int, ...]
    split: int | None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args:
            raise QuantDMError(
                f"{self.name}: was called with keywords only, expected the input first; unset activations"
            )
        x, *rest = args
        if self.split is None or self.dims != -1:
            return (fake_quantize(x, self.bits, self.dims), *rest)
        # Tokens of a concatenated long skip: each half has its own range, as each half of the weight has.
        halves = (x[..., : self.split], x[..., self.split :])
        return (torch.cat([fake_quantize(half, self.bits) for half in halves], dim=-1), *rest)


@dataclass(frozen=True)
class _QuantizeOutput:
    """Forward hook: quantize what a query, key or value projection returns, per token."""

    bits: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return fake_quantize(output, self.bits)


def set_activation_bits_(denoiser: nn.Module, spec: ActivationSpec | None) -> None:
    """Quantize the inputs of all Linear and Conv layers, and Q, K, V, while the denoiser runs; None switches it off.

    Linear inputs get one range per token, conv inputs one per (sample, channel) map. Setting replaces what was set
    before; None removes every hook.

    Raises:
        QuantDMError: a glob of `spec.keep_8bit` matches nothing; nothing is changed then.
    """
    bits = {} if spec is None else layer_bits(denoiser, spec)
    state: _State | None = denoiser.__dict__.pop(_STATE, None)
    for handle in state.handles if state else ():
        handle.remove()
    if spec is None:
        return
    handles = []
    for record in list_layers(denoiser):
        module = denoiser.get_submodule(record.name)
        dims = -1 if record.kind == "linear" else tuple(range(2, 2 + int(record.kind[4])))
        hook = _QuantizeInput(record.name, bits[record.name], dims, record.split)
        handles.append(module.register_forward_pre_hook(hook))
        if any(fnmatchcase(record.op_type, pattern) for pattern in _ATTENTION_OPERANDS):
            handles.append(module.register_forward_hook(_QuantizeOutput(bits[record.name])))
    denoiser.__dict__[_STATE] = _State(spec, tuple(handles))


def activation_spec(denoiser: nn.Module) -> ActivationSpec | None:
    """Return what `set_activation_bits_` last set on this denoiser."""
    state: _State | None = denoiser.__dict__.get(_STATE)
    return state.spec if state else None
