"""How far explanations agree: with each other, and with what really swapping single layers changed."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantdm.errors import QuantDMError
from quantdm.surrogates.attribution import Attribution
from quantdm.surrogates.ranking import spearman

Floats = NDArray[np.float64]


def agreement(attributions: Mapping[str, Attribution]) -> list[dict[str, Any]]:
    """Compare every two attributions of one space.

    Returns one row per pair: `a`, `b`; `values`, Spearman over all layers x options (every layer's values centred);
    `importance`, Spearman over layers of the range of their values.

    Raises:
        QuantDMError: fewer than two attributions, or of other layers or options.
    """
    if len(attributions) < 2:
        raise QuantDMError(f"agreement: got {len(attributions)} attributions, expected two or more")
    rows = []
    for (a, one), (b, other) in combinations(attributions.items(), 2):
        if (one.layers, one.options) != (other.layers, other.options):
            raise QuantDMError(f"agreement: {a} and {b} explain other layers or options; explain one space with both")
        rows.append(
            {
                "a": a,
                "b": b,
                "values": spearman(_centred(one.values).ravel(), _centred(other.values).ravel()),
                "importance": spearman(importance(one), importance(other)),
            }
        )
    return rows


def agreement_with_truth(
    attribution: Attribution, layer: ArrayLike, option: ArrayLike, delta_y: ArrayLike, *, reference: ArrayLike
) -> dict[str, Any]:
    """Compare an attribution with measured swaps of single layers.

    Args:
        attribution: what is to be judged.
        layer: positions on the layer axis [N].
        option: the option that the layer takes instead of its own [N].
        delta_y: measured y of the swapped configuration minus that of the reference [N]; larger is better.
        reference: the configuration in which the layers were swapped [L].

    Returns `swaps` (N), `values` (Spearman over the swaps of values[layer, option] - values[layer, own] with delta_y),
    `importance` (Spearman over the layers of the largest change either way) and `layers` (how many).

    Raises:
        QuantDMError: arrays of different lengths, positions that do not exist, labels that are not finite.
    """
    swapped, chosen = np.asarray(layer), np.asarray(option)
    measured, own = np.asarray(delta_y, dtype=np.float64), np.asarray(reference)
    if not (swapped.shape == chosen.shape == measured.shape and measured.ndim == 1 and len(measured) >= 2):
        raise QuantDMError(
            f"measured swaps: got shapes {swapped.shape}, {chosen.shape}, {measured.shape}, expected one length >= 2"
        )
    if own.shape != (len(attribution.layers),):
        raise QuantDMError(
            f"reference: got shape {own.shape}, expected one option for {len(attribution.layers)} layers"
        )
    for what, array, size in (
        ("layer", swapped, len(attribution.layers)),
        ("option", chosen, len(attribution.options)),
    ):
        if not np.issubdtype(array.dtype, np.integer) or array.min() < 0 or array.max() >= size:
            raise QuantDMError(f"measured swaps: {what} must hold positions from 0 to {size - 1}")
    if not np.isfinite(measured).all():
        raise QuantDMError(f"measured swaps: {int((~np.isfinite(measured)).sum())} of delta_y are NaN or infinite")
    told = attribution.values[swapped, chosen] - attribution.values[swapped, own[swapped]]
    layers = np.unique(swapped)
    largest = [[float(np.abs(change[swapped == index]).max()) for index in layers] for change in (told, measured)]
    return {
        "swaps": len(measured),
        "values": spearman(told, measured),
        "layers": len(layers),
        "importance": spearman(*largest),
    }


def importance(attribution: Attribution) -> Floats:
    """Return how much the choice for a layer matters: the range of its values, [L]."""
    return np.ptp(attribution.values, axis=1)


def _centred(values: Floats) -> Floats:
    return values - values.mean(axis=1, keepdims=True)
