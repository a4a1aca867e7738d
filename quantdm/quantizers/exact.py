"""The exact optimum of one-dimensional k-means, row by row, by dynamic programming on the CPU.

D_j[i], the least error of the first i sorted weights in j clusters, is the minimum over m of D_(j-1)[m] + error(m, i).
The best m does not fall as i grows, nor as j does (errors of intervals are a Monge array), so each layer is computed by
halving: the best m of every 2s-th place encloses those between. What cannot be part of the best is left out: clusters
are built up from both ends and joined in the middle; a place is dropped when its error alone, or with the least that
the other end can cost, exceeds that of a solution already known. D_j[i] is convex in j, which bounds the other end.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.int64]
SLACK = 1 + 1e-9  # the known solution itself must survive rounding
LEAST_COUNT = 1e-12
CHUNK = 2**15  # places worked on at a time


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums over the weights left of each place, [R, m + 1]: how many there are, of their values, of the squares."""

    counts: Array
    values: Array
    squares: Array

    def mirrored(self) -> "_Sums":
        return _Sums(*(x[:, -1:] - x[:, ::-1] for x in (self.counts, self.values, self.squares)))


def optimal_cuts(counts: Array, values: Array, squares: Array, k: int, known: Array) -> Index:
    """Return the cuts [R, k + 1], from 0 to m, of the optimal clustering of sorted rows into k clusters, 1 < k <= m.

    `counts`, `values` and `squares` [R, m + 1] are sums over what lies left of each place (1, w and w^2, or times the
    importance); `known` [R] is the error of some clustering into k clusters.
    """
    step = max(CHUNK // counts.shape[1], 1)
    parts = [slice(i, i + step) for i in range(0, len(counts), step)]
    return np.concatenate([_cuts(_Sums(counts[p], values[p], squares[p]), k, known[p]) for p in parts])


def _cuts(sums: _Sums, k: int, known: Array) -> Index:
    R, m = len(known), sums.counts.shape[1] - 1
    left, right = k // 2, k - k // 2
    bound = known * SLACK + 1e-13 * sums.squares[:, -1]
    ends, from_right = _layers(sums.mirrored(), right, bound, None)
    rest, before = (x[:, ::-1] for x in ends)
    both = np.isfinite(before) & np.isfinite(rest)
    fall = np.full(rest.shape, np.inf)  # of the error from one cluster more; the next one takes off less
    np.subtract(before, rest, out=fall, where=both)
    known_rest, least_rest = np.isfinite(rest), [rest]
    for r in range(1, left):
        least = np.maximum(np.where(known_rest, rest, 0) - r * fall, 0)
        least_rest.append(np.maximum.accumulate(least[:, ::-1], axis=1)[:, ::-1])  # more weights cost no less
    (best, _), from_left = _layers(sums, left, bound, least_rest[::-1])
    lines = np.arange(R)
    cuts = np.empty((R, k + 1), dtype=np.int64)
    cuts[:, 0], cuts[:, left], cuts[:, k] = 0, (best + rest).argmin(axis=1), m
    for j in range(left, 1, -1):
        cuts[:, j - 1] = from_left[j - 1][lines, cuts[:, j]]
    place = m - cuts[:, left]
    for j in range(right, 1, -1):
        place = from_right[j - 1][lines, place]
        cuts[:, k - j + 1] = m - place
    return cuts


def _layers(
    sums: _Sums, layers: int, bound: Array, least_rest: list[Array] | None
) -> tuple[tuple[Array, Array], list[Index]]:
    """Return D of the last layer and of the one before it, inf where left out, and the best m of each layer.

    `least_rest` [layers] says what lies right of a place costs at least.
    """
    R, size = sums.counts.shape
    best = sums.squares - sums.values**2 / np.maximum(sums.counts, LEAST_COUNT)
    before, needed = best, np.ones(R, dtype=np.int64)
    chosen = [np.zeros((R, size), dtype=np.int64)]
    for j in range(layers):
        if least_rest is not None:
            needed = (least_rest[j] <= bound[:, None]).argmax(axis=1)
        if j:
            before = best
            best, places = _layer(sums, best, chosen[-1], needed, bound)
            chosen.append(places)
        total = best if least_rest is None else best + least_rest[j]
        possible = total <= bound[:, None]
        first, last = possible.argmax(axis=1), size - 1 - possible[:, ::-1].argmax(axis=1)
        outside = (np.arange(size) < first[:, None]) | (np.arange(size) > last[:, None])
        best = np.where(outside, np.inf, best)
    return (best, before), chosen


def _layer(sums: _Sums, best: Array, earlier: Index, needed: Index, bound: Array) -> tuple[Array, Index]:
    """Add a cluster: D [R, m + 1] of the next layer from `best`, and the best m; -1 where a place was left out."""
    R, size = best.shape
    flat = _Sums(sums.counts.ravel(), sums.values.ravel(), sums.squares.ravel())
    start = (best - sums.squares).ravel()
    alive = np.isfinite(best)
    first, last = alive.argmax(axis=1), size - 1 - alive[:, ::-1].argmax(axis=1)
    result, places = np.full((R, size), np.inf), np.full((R, size + 1), -1, dtype=np.int64)
    dead = np.full(R, size)  # the first place known to exceed the bound; all beyond it do as well
    stride = 1 << max((size - 1).bit_length() - 1, 0)
    while stride:
        at = np.arange(stride, size, 2 * stride)
        lines, column = ((at >= np.maximum(needed, first)[:, None]) & (at < dead[:, None])).nonzero()
        i = at[column]
        if len(i):
            low = np.maximum(np.maximum(places[lines, i - stride], earlier[lines, i]), first[lines])
            after = places[lines, np.minimum(i + stride, size)]
            high = np.minimum(np.where(after < 0, size, after), np.minimum(last[lines], i))
            least, m = _least_of_ranges(flat, start, lines * size, i, np.minimum(low, high), high)
            places[lines, i] = m
            result[lines, i] = least
            over = least > bound[lines]
            np.minimum.at(dead, lines[over], i[over])
        stride //= 2
    return result, places[:, :size]


def _least_of_ranges(flat: _Sums, start: Array, row: Index, i: Index, low: Index, high: Index) -> tuple[Array, Index]:
    """Return the least error of each place i over the last cuts m from `low` to `high`, and the first such m.

    All ranges lie in one array, one after the other. `row` is where a place's row begins in the flat sums; `start` is
    the error up to m less the sum of squares there.
    """
    length = high - low + 1
    begin = length.cumsum() - length
    m = np.arange(begin[-1] + length[-1])
    m += np.repeat(row + low - begin, length)
    count = np.repeat(flat.counts[row + i], length)
    count -= flat.counts.take(m)
    np.maximum(count, LEAST_COUNT, out=count)
    total = np.repeat(flat.values[row + i], length)
    total -= flat.values.take(m)
    total *= total
    total /= count
    error = start.take(m)
    error -= total
    least = np.minimum.reduceat(error, begin)
    hits = np.flatnonzero(error == np.repeat(least, length))
    least += flat.squares[row + i]
    return least, m[hits[np.searchsorted(hits, begin)]] - row
