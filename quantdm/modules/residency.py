"""Residency: in which form packed layers keep their weights in memory while they run, and in which they multiply."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from quantdm.errors import QuantDMError, check_kind, nearest
from quantdm.modules.kernels import compile_kernels
from quantdm.modules.packed import RESIDENCIES, PackedLayer, Residency, packed_layers

LARGE = 2**25  # weights of a model from which on kernels are compiled: that takes seconds


def set_residency(model: nn.Module, residency: Residency) -> tuple[str, ...]:
    """Choose the form in which the packed layers of a model keep their weights, and in which they multiply.

    Bytes per weight in memory, with b bits a weight: "packed" b/8, decoded at every call; "int8" b/8 + 1 and 4 to 8 a
    row, decoded by one multiplication; "dense" b/8 + 2 (bf16) or 4 (fp32), not decoded at all. Their outputs are the
    same bit by bit.

    "integer" multiplies in 8 bits where inputs are quantized (`set_activation_bits_`): as much memory as "int8", and
    the output of the simulation up to rounding. "auto" measures for every layer and shape of its input whether that or
    "dense" is faster here, when it first comes, and remembers it in the user's cache. Both apply without gradients and
    outside compiled graphs; elsewhere, and where an integer product cannot compute the scheme of an input (said once
    in the log), activations stay simulated. For large models two small kernels are compiled if there is a compiler.

    The packed bytes stay in every residency: they are what `save_pretrained` writes, the other forms are never saved.
    `.to(device)` moves and `.to(dtype)` keeps the residency; a model just loaded is "packed". Choose it before offload
    is switched on.

    Returns:
        The layers that take the next best form: "int8" and "integer" need weights that are whole multiples of their
        row's scale (uniform, k-means with an int8 codebook, log2 up to 3 bits), "integer" one scale per row and
        operators of the device. A warning says why.

    Raises:
        QuantDMError: unknown residency, no packed layers, or weights that an offload hook keeps elsewhere.
    """
    check_kind(model, nn.Module, "model", "give the network itself, such as quantdm.get_denoiser(pipe)")
    if residency not in RESIDENCIES:
        raise QuantDMError(f"residency: got {residency!r}, expected one; {nearest(str(residency), RESIDENCIES)}")
    layers = packed_layers(model)
    if not layers:
        raise QuantDMError(f"{type(model).__name__} has no packed layers; apply_recipe() first")
    for name, layer in layers.items():
        if layer.packed.is_meta:
            raise QuantDMError(f"{name}: its bytes are offloaded or not loaded; set the residency before offloading")
    for layer in layers.values():
        layer.keep_(residency)
    if residency in ("integer", "auto") and sum(math.prod(layer.weight_shape) for layer in layers.values()) >= LARGE:
        compile_kernels()
    rest = tuple(name for name, layer in layers.items() if layer.residency != residency)
    if rest:
        warnings.warn(_what_is_left(residency, layers, rest), stacklevel=2)
    return rest


def _what_is_left(residency: Residency, layers: Mapping[str, PackedLayer], rest: Sequence[str]) -> str:
    start, first = f"{residency} residency: {len(rest)} of {len(layers)} layers", f"first {', '.join(rest[:3])}"
    if residency == "integer":
        reasons = "; ".join(sorted({str(layers[name].obstacle) for name in rest}))
        return f"{start} do not multiply integers ({reasons}), {first}"
    schemes = ", ".join(sorted({layers[name].label for name in rest}))
    return f"{start} stay packed ({schemes} has no exact form), {first}"


@contextmanager
def dense_weights(model: nn.Module) -> Iterator[None]:
    """Keep every packed weight decoded inside the block: many forwards run at the speed of the dense model."""
    before: dict[PackedLayer, Residency] = {
        layer: layer.residency for layer in packed_layers(model).values() if layer.residency != "dense"
    }
    for layer in before:
        layer.keep_("dense")
    try:
        yield
    finally:
        for layer, residency in before.items():
            layer.keep_(residency)
