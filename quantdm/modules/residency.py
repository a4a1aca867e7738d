"""Residency: in which form packed layers keep their weights in memory while they run."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from quantdm.errors import QuantDMError, nearest
from quantdm.modules.packed import RESIDENCIES, PackedLayer, Residency, packed_layers


def set_residency(model: nn.Module, residency: Residency) -> tuple[str, ...]:
    """Choose the form in which the packed layers of a model keep their weights; outputs stay the same bit by bit.

    Bytes per weight in memory, with b bits a weight: "packed" b/8, decoded at every call; "int8" b/8 + 1 and 4 to 8 a
    row, decoded by one multiplication; "dense" b/8 + 2 (bf16) or 4 (fp32), not decoded at all. The packed bytes stay
    in every residency: they are what `save_pretrained` writes, the other forms are never saved. `.to(device)` moves
    and `.to(dtype)` keeps the residency; a model just loaded is "packed". Choose it before offload is switched on.

    Returns:
        The layers that stay packed: "int8" needs weights that are whole multiples of their row's scale (uniform,
        k-means with an int8 codebook, log2 up to 3 bits). A warning names their schemes.

    Raises:
        QuantDMError: unknown residency, no packed layers, or weights that an offload hook keeps elsewhere.
    """
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
    rest = tuple(name for name, layer in layers.items() if layer.residency != residency)
    if rest:
        schemes = ", ".join(sorted({layers[name].label for name in rest}))
        warnings.warn(
            f"{residency} residency: {len(rest)} of {len(layers)} layers stay packed ({schemes} has no exact form), "
            f"first {', '.join(rest[:3])}",
            stacklevel=2,
        )
    return rest


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
