"""Dynamic activation quantization of any denoiser, quantized or not, with hooks that come off again.

Simulated ("fake") quantization: values are rounded to the integer grid and returned as floats. Softmax probabilities
stay in floating point: fused attention kernels never show them.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from quantdm.denoisers.layers import LayerRecord, list_layers
from quantdm.errors import QuantDMError, nearest
from quantdm.recipe import ActivationSpec

# Layers that stay at 8 bits (method.md section 9), as globs on operation types; see `default_keep_8bit`.
KEEP_8BIT: tuple[str, ...] = (
    "conv_in",
    "conv_out",
    "*x_embedder",
    "*pos_embed.proj",
    "*patch_embed*",
    "*time_embed*",
    "*timestep_embedder*",
    "*time_text_embed*",
    "*time_emb_proj",
    "*adaln_single*",
    "proj_out",
    "proj_out_[0-9]",
    "final_layer*",
    "ff*.net.2",
    "*ff_context.net.2",
    "*mlp.fc2",
)

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

MIN_SCALE = torch.finfo(torch.float32).tiny
_STATE = "_quantdm_activations"


@dataclass(frozen=True)
class _State:
    spec: ActivationSpec
    handles: tuple[Any, ...]


def fake_quantize(x: torch.Tensor, bits: int, dims: int | tuple[int, ...] = -1) -> torch.Tensor:
    """Round `x` to 2^bits levels between its minimum and maximum over `dims`, asymmetrically.

    Returns a new tensor of the same shape and dtype; computed in fp32. `dims=-1` is one range per token, `dims=(2, 3)`
    one per (sample, channel) map. Source: Qua2SeDiMo section 4 (dynamic min-max), method.md section 9.
    """
    with torch.no_grad():
        levels = 2**bits - 1
        y = x.float()
        low, high = y.amin(dims, keepdim=True), y.amax(dims, keepdim=True)
        # A constant token has no range; a step that keeps its zero point small returns it to within 2^-20.
        scale = torch.maximum((high - low) / levels, high.abs() * 2**-20).clamp_(min=MIN_SCALE)
        zero = torch.round(low / scale)  # -z: an integer, so that an integer GEMM can correct for it
        # x_hat = scale * clip(round(x / scale), -z, levels - z)
        y = torch.div(y, scale).round_()
        y = torch.clamp(y, zero, zero + levels, out=y).mul_(scale).to(x.dtype)
    # Straight-through: x - x.detach() is exactly zero and carries the gradient.
    return y + (x - x.detach()) if x.requires_grad and torch.is_grad_enabled() else y


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


def _matches(record: LayerRecord, pattern: str) -> bool:
    return fnmatchcase(record.op_type, pattern) or fnmatchcase(record.name, pattern)


def default_keep_8bit(denoiser: nn.Module) -> tuple[str, ...]:
    """Return the globs of `KEEP_8BIT` that match a layer of this denoiser (a recipe's glob must match something)."""
    records = list_layers(denoiser)
    return tuple(p for p in KEEP_8BIT if any(fnmatchcase(record.op_type, p) for record in records))


def layer_bits(denoiser: nn.Module, spec: ActivationSpec) -> dict[str, int]:
    """Return the activation bits of every layer: layer name -> 6 or 8.

    Raises:
        QuantDMError: a glob of `keep_8bit` matches no layer name and no operation type.
    """
    records = list_layers(denoiser)
    for pattern in spec.keep_8bit:
        if not any(_matches(record, pattern) for record in records):
            known = dict.fromkeys(record.op_type for record in records)
            raise QuantDMError(
                f"keep_8bit: {pattern!r} matches no layer and no operation type; {nearest(pattern, known)}"
            )
    return {r.name: 8 if any(_matches(r, p) for p in spec.keep_8bit) else spec.bits for r in records}


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
