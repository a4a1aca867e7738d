"""Other sizes: what is predicted for them by whatever orders the measured trials best, read through those trials."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantdm.allocation import pareto
from quantdm.allocation.pruning import dominated
from quantdm.report.records import Records
from quantdm.runs.labelled import label_of
from quantdm.runs.resize import SENSITIVITY
from quantdm.surrogates import SearchSpace

Floats = NDArray[np.float64]
COUNT = 25  # sizes offered
BEYOND = 2.0  # times the measured distances: a prediction further out is not offered
LEAST = 5  # measured trials from which totals are set against them
FOLDS, PER_KNOT, MOST_KNOTS = 5, 16, 10
NEAR = 1 / 3  # of the trials tell how far distances scatter at one total


@dataclass(frozen=True)
class Size:
    """What is predicted of the best recipe of one size; its distance is `low` to `high` as the trials scatter."""

    bits: float
    denoiser_bytes: int
    fid: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Curve:
    """y as a function of a total: never falling, straight between knots, and on at one slope beyond them."""

    x: Floats
    y: Floats
    slope: float

    def __call__(self, total: ArrayLike) -> Floats:
        """Return y at totals."""
        total = np.asarray(total, dtype=np.float64)
        beyond = np.minimum(total - self.x[0], 0) + np.maximum(total - self.x[-1], 0)
        return np.interp(total, self.x, self.y) + self.slope * beyond


@dataclass(frozen=True, eq=False)
class Reading:
    """What totals of choices say about distances: a curve through the trials, and how those scatter around it.

    `errors` are those of trials that the curve was not fitted to, beside their totals. `values` [L, O] choose recipes.
    """

    name: str
    values: Floats
    total: Callable[[ArrayLike], Floats]
    curve: Curve
    totals: Floats
    errors: Floats

    def fid(self, choice: ArrayLike, sds: float = 0.0) -> float:
        """Return the distance that is read for a choice [L], `sds` standard deviations worse."""
        total = float(self.total(choice)[0])
        near = np.argsort(np.abs(self.totals - total))[: max(LEAST, round(NEAR * len(self.totals)))]
        return float(np.exp(-self.curve(total) + sds * np.sqrt(np.mean(self.errors[near] ** 2))))


def fit_curve(total: Floats, y: Floats) -> Curve | None:
    """Fit a curve that never falls to means of neighbouring trials (pool adjacent violators: Barlow et al. 1972).

    None: y falls with the total, or there is but one total.
    """
    if np.ptp(total) == 0:
        return None
    slope = float(np.polyfit(total, y, 1)[0])
    if slope <= 0:
        return None
    parts = np.array_split(np.argsort(total, kind="stable"), max(2, min(MOST_KNOTS, len(y) // PER_KNOT)))
    pooled: list[tuple[float, float, list[float]]] = []  # mean of y, trials, totals of the knots
    for part in parts:
        mean, weight, at = float(y[part].mean()), float(len(part)), [float(total[part].mean())]
        while pooled and pooled[-1][0] > mean:
            before, count, places = pooled.pop()
            mean, weight, at = (before * count + mean * weight) / (count + weight), count + weight, places + at
        pooled.append((mean, weight, at))
    knots = np.array([(x, mean) for mean, _, places in pooled for x in places])
    return Curve(knots[:, 0], knots[:, 1], slope)


def _held_out(total: Floats, y: Floats) -> Floats | None:
    """Return the error of y for every trial by a curve through the others (five folds); None: some have no curve."""
    errors, order = np.zeros(len(y)), np.random.default_rng(0).permutation(len(y))
    for fold in np.array_split(order, FOLDS):
        curve = fit_curve(np.delete(total, fold), np.delete(y, fold))
        if curve is None:
            return None
        errors[fold] = y[fold] - curve(total[fold])
    return errors


@lru_cache(maxsize=1)
def read_values(records: Records) -> Reading | None:
    """Read totals as distances: those of the explanation, or of one-layer sensitivities, that predict trials best.

    Which predicts best is told by trials that a curve was not fitted to. None: too few trials, or all rank them the
    wrong way round.
    """
    if records.space is None:
        return None
    space = records.space
    known = [trial for trial in records.trials if space.holds(trial["config"])]
    if len(known) < LEAST:
        return None
    choices, y = space.choices_of([trial["config"] for trial in known]), np.array([label_of(trial) for trial in known])
    found: list[tuple[float, Reading]] = []
    for name, (values, total) in _rulers(records, space).items():
        totals = total(choices)
        curve = fit_curve(totals, y)
        errors = None if curve is None else _held_out(totals, y)
        if curve is not None and errors is not None:
            found.append((float(np.mean(errors**2)), Reading(name, values, total, curve, totals, errors)))
    return min(found, key=lambda each: each[0])[1] if found else None


def _rulers(records: Records, space: SearchSpace) -> dict[str, tuple[Floats, Callable[[ArrayLike], Floats]]]:
    """Return what may order choices: values that choose, and the total that is read.

    Values of layers add up to a total that hardly moves where all layers are good; the logarithm of the summed
    sensitivities does not stop there.
    """

    def summed(choices: ArrayLike) -> Floats:
        return -np.log(np.maximum(space.gather(space.noise_error, np.atleast_2d(choices)).sum(axis=1), 1e-12))

    found = {name: (a.values, a.total) for name, a in (records.attributions or {}).items()}
    return {**found, SENSITIVITY: (-space.noise_error, summed)}


@lru_cache(maxsize=1)
def other_sizes(records: Records) -> tuple[Size, ...]:
    """Return the predicted sizes, smallest first; none where a run has too few trials."""
    reading, space = read_values(records), records.space
    if reading is None or space is None:
        return ()
    measured = [t["fid_fp"] for t in records.trials]
    found = []
    for choice in pareto(space, reading.values, COUNT, forbidden=dominated(space)):
        fid = reading.fid(choice)
        if not min(measured) / BEYOND <= fid <= max(measured) * BEYOND:
            continue
        bits = int(space.total_bits(choice)[0])
        found.append(
            Size(
                bits=bits / int(space.num_weights.sum()),
                denoiser_bytes=_file_bytes(records, bits),
                fid=fid,
                low=reading.fid(choice, -2),
                high=reading.fid(choice, 2),
            )
        )
    return tuple(found)


def _file_bytes(records: Records, bits: int) -> int:
    """Return the denoiser's bytes at a number of bits for its weights: the rest is as in the recipe's file.

    Before the recipe is measured nobody knows the rest: then they are those of the quantized weights alone.
    """
    recipe, space = records.rows.get("recipe"), records.space
    rest = 0
    if recipe is not None and space is not None:
        rest = recipe["denoiser_bytes"] - round(recipe["avg_bits"] * int(space.num_weights.sum()) / 8)
    return rest + bits // 8


def front(points: NDArray[np.float64]) -> list[tuple[float, float]]:
    """Return the points [N, 2] that no other one beats in both coordinates (less is better), by the first one."""
    best, found = np.inf, []
    for x, y in sorted(map(tuple, points.tolist())):
        if y < best:
            best = y
            found.append((x, y))
    return found
