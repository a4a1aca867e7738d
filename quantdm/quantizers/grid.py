"""The best codebook of a row among those that an int8 table holds: multiples of a step, chosen by dynamic programming.

A codebook that is rounded to the grid is good where its levels lie many steps apart. In a row of outliers the step, a
127th of the largest weight, is as wide as the bulk, and which multiples serve it is another problem than which levels
do: rounded to 4 bits, such rows have up to 1.4 times the error of the optimum. The error of ascending levels is a sum
over neighbouring pairs, every weight taking the nearer one of its two, so the best k of c levels are found in O(k·c^2),
as a shortest path.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantdm.quantizers.sorted_rows import SortedRows

PLACES = (127.0, 123.0, 119.0, 115.0, 111.0)  # where the largest level may come to lie
MOST_ENTRIES = 16  # of a codebook: with more the step is too coarse for such a row whatever is chosen
LEAST_STEP = 2.0**-24
Array = NDArray[np.floating[Any]]


def fit_to_grid(rows: SortedRows, codebook: Tensor, table: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 tables [R, k] and fp16 scales [R] of no larger error than those given; computed on the CPU.

    Args:
        rows: of weights, or with importance.
        codebook: unrounded, float32 [R, k], k at most MOST_ENTRIES.
        table: the rounded one.
        scale: of that.
    """
    R, m = rows.values.shape
    left = rows.left_of(torch.arange(m + 1, device=rows.values.device).expand(R, -1)).double().cpu().numpy()
    values, tops = rows.values.double().cpu().numpy(), codebook.abs().amax(dim=1).cpu().numpy()
    tables, scales = table.clone(), scale.clone()
    for r in range(R):
        sums = _Sums(values[r], left[r])
        step = float(scale[r].float())
        best = sums.error(table[r].double().cpu().numpy() * step)
        for place in PLACES:
            step = max(float(np.float16(tops[r] / place)), LEAST_STEP)
            levels, error = sums.best(step, table.shape[1])
            if error < best:
                best, scales[r] = error, step
                tables[r] = torch.from_numpy(levels.astype(np.int8)).to(table.device)
    return tables, scales


class _Sums:
    """Sums over the ascending values of one row, left of every place: mass, mass times value, times its square."""

    def __init__(self, values: Array, left: Array) -> None:
        mass = np.diff(left)
        self.values = values
        self.sums = tuple(np.append(0.0, np.cumsum(mass * values**power)) for power in range(3))

    def cost(self, first: NDArray[np.int64], last: NDArray[np.int64], level: Array) -> Array:
        """Return the squared error of the values at places first to last at a level."""
        count, total, square = (s[last] - s[first] for s in self.sums)
        return square - 2 * level * total + level**2 * count

    def error(self, levels: Array) -> float:
        """Return the squared error of the row at ascending levels."""
        cuts = np.searchsorted(self.values, (levels[1:] + levels[:-1]) / 2)
        cuts = np.concatenate([[0], cuts, [len(self.values)]])
        return float(self.cost(cuts[:-1], cuts[1:], levels).sum())

    def best(self, step: float, k: int) -> tuple[NDArray[np.int64], float]:
        """Return the k best multiples of a step, ascending, and their error."""
        lowest, highest = (int(np.clip(round(float(self.values[end]) / step), -127, 127)) for end in (0, -1))
        places = np.arange(lowest, highest + 1)
        if len(places) <= k:
            chosen = np.append(places, np.repeat(places[-1:], k - len(places)))
            return chosen, self.error(chosen * step)
        levels, index = places * step, np.arange(len(places))
        halves = np.searchsorted(self.values, np.arange(2 * lowest, 2 * highest + 1) * (step / 2))
        at, middle = halves[::2], halves[index[:, None] + index]
        pair = self.cost(at[:, None], middle, levels[:, None]) + self.cost(middle, at, levels)
        pair[np.tril_indices(len(levels))] = np.inf
        found = self.cost(np.zeros_like(at), at, levels)
        back = []
        for _ in range(k - 1):
            through = found[:, None] + pair
            back.append(through.argmin(axis=0))
            found = through[back[-1], np.arange(len(levels))]
        found = found + self.cost(at, np.full_like(at, len(self.values)), levels)
        path = [int(found.argmin())]
        for row in reversed(back):
            path.append(int(row[path[-1]]))
        return places[path[::-1]], float(found.min())
