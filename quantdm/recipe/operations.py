"""Bit operations: what products cost where hardware pays for the bits of both factors."""

from collections.abc import Mapping

from quantdm.recipe.activations import ActivationScheme
from quantdm.schemes import ORIGINAL_BITS, Scheme


def factor_bits(scheme: Scheme | ActivationScheme | None) -> int:
    """Return the bits of one factor of a product; what is not quantized has 16."""
    return ORIGINAL_BITS if scheme is None else scheme.bits


def bit_operations(
    macs: Mapping[str, int],
    weights: Mapping[str, Scheme | None],
    activations: Mapping[str, ActivationScheme | None],
) -> int:
    """Return the sum over layers of MACs x weight bits x activation bits (BOPs, UNIQ, arXiv 1804.10969, without sums).

    Args:
        macs: multiply-accumulates of every layer (`layer_macs`).
        weights, activations: schemes by layer; what is missing is not quantized.
    """
    return sum(
        count * factor_bits(weights.get(name)) * factor_bits(activations.get(name)) for name, count in macs.items()
    )
