"""Pooled features of a choice: additive sums over layers, per operation type and depth band.

Raw one-hot columns per layer over-fit a few hundred rows (docs/method.md, Surrogates); shares per (operation type x
depth band) are shared between models and few. Every feature is s_f = sum over layers of c_f[l, choice_l], taken as it
is or as log s_f, so anything that is linear in s_f splits exactly over layers and options.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantdm.surrogates.space import SearchSpace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
DEPTH_BANDS = 3


@dataclass(frozen=True, eq=False)
class PooledFeatures:
    """Features s_f of choices: `coefficients` [F, L, O], names [F], and which of them are logarithms [F]."""

    space: SearchSpace
    names: tuple[str, ...]
    coefficients: Floats
    is_log: NDArray[np.bool_]

    def sums(self, choices: ArrayLike) -> Floats:
        """Return the additive sums s_f: [T, L] -> [T, F]."""
        choices = self.space.check(choices)
        options = self.coefficients.shape[2]
        table = np.ascontiguousarray(self.coefficients.reshape(len(self.names), -1).T)  # [L·O, F]
        found = np.zeros((len(choices), len(self.names)))
        for layer in range(choices.shape[1]):
            found += table[layer * options + choices[:, layer]]
        return found

    def transform(self, choices: ArrayLike) -> Floats:
        """Return the features as the models see them: [T, L] -> [T, F]."""
        found = self.sums(choices)
        found[:, self.is_log] = np.log(np.maximum(found[:, self.is_log], 1e-30))
        return found

    def project(self, slopes: Floats) -> Floats:
        """Spread slopes d(prediction)/d(s_f) [F] over layers and options: sum_f slope_f · c_f[l, o], [L, O]."""
        return np.tensordot(slopes, self.coefficients, axes=1)


def type_index(space: SearchSpace) -> tuple[tuple[str, ...], Ints]:
    """Return the operation types in order of first appearance, and the type of every layer [L]."""
    types = tuple(dict.fromkeys(layer.op_type for layer in space.layers))
    return types, np.array([types.index(layer.op_type) for layer in space.layers], dtype=np.int64)


def band_index(space: SearchSpace, bands: int = DEPTH_BANDS) -> Ints:
    """Return the depth band of every layer [L]: 0 near the input, bands-1 near the output."""
    return np.minimum((space.depth * bands).astype(np.int64), bands - 1)


def pool(space: SearchSpace, *, logarithms: bool) -> PooledFeatures:
    """Build the pooled features of a space.

    Per (operation type x depth band): the share of weights that take each option; the sum of one-layer noise errors and
    of weight errors. The same errors per type, per band and over all layers, average bits per type and over all. With
    `logarithms` the error sums enter as logarithms (for trees); without, everything is additive over layers.
    """
    types, type_of = type_index(space)
    band_of = band_index(space)
    weights = space.num_weights.astype(np.float64)
    noise = np.maximum(space.felt_error, 1e-12 * space.noise_error.max())
    loss = np.maximum(space.weight_error, 1e-12 * space.weight_error.max())
    masks = {"all": np.ones(len(type_of), dtype=bool)}
    masks |= {f"depth {band}": band_of == band for band in np.unique(band_of)}
    masks |= {name: type_of == index for index, name in enumerate(types)}
    cells = {
        f"{name} @ depth {band}": (type_of == index) & (band_of == band)
        for index, name in enumerate(types)
        for band in np.unique(band_of)
    }
    cells = {name: mask for name, mask in cells.items() if mask.any()}
    names, rows, is_log = [], [], []

    def add(name: str, mask: NDArray[np.bool_], table: Floats, log: bool) -> None:
        names.append(name)
        rows.append(np.where(mask[:, None], table, 0.0))
        is_log.append(log)

    for cell, mask in cells.items():
        share = weights / weights[mask].sum()
        for index, label in enumerate(space.labels):
            add(f"share of {label} in {cell}", mask, share[:, None] * (np.arange(len(space.labels)) == index), False)
    for group, mask in {**masks, **cells}.items():
        add(f"noise error of {group}", mask, noise, logarithms)
        add(f"weight error of {group}", mask, loss, logarithms)
    for group, mask in masks.items():
        add(f"average bits of {group}", mask, space.bits / weights[mask].sum(), False)
    return PooledFeatures(space, tuple(names), np.stack(rows), np.array(is_log))
