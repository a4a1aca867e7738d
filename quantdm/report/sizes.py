"""Other sizes: what the recipe's explanation predicts for them, set against the trials that were measured."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from quantdm.allocation import pareto
from quantdm.allocation.pruning import dominated
from quantdm.report.records import Records

COUNT = 25  # sizes offered
BEYOND = 2.0  # times the measured distances: a prediction further out is not offered
LEAST = 5  # measured trials from which values are set against them


@dataclass(frozen=True)
class Size:
    """What is predicted of the best recipe of one size; its distance is `low` to `high` as the trials scatter."""

    bits: float
    denoiser_bytes: int
    fid: float
    low: float
    high: float


@dataclass(frozen=True)
class Reading:
    """y = offset + slope · (total value of a choice), fitted to the trials; `scatter`: standard deviation around it."""

    offset: float
    slope: float
    scatter: float

    def fid(self, total: float, sds: float = 0.0) -> float:
        """Return the distance that a total value stands for, `sds` standard deviations worse."""
        return float(np.exp(-(self.offset + self.slope * total) + sds * self.scatter))


def read_values(records: Records) -> Reading | None:
    """Fit the explanation's values to the trials of this space (least squares); None: nothing to fit."""
    if records.space is None or records.explanation is None:
        return None
    space, attribution = records.space, records.explanation[1]
    trials = [t for t in records.trials if set(t["config"]) == set(space.layer_names)]
    known = [t for t in trials if set(t["config"].values()) <= set(space.labels)]
    if len(known) < LEAST:
        return None
    position = {label: index for index, label in enumerate(space.labels)}
    choices = np.array([[position[t["config"][name]] for name in space.layer_names] for t in known])
    y = -np.log(np.maximum([t["fid_fp"] for t in known], 1e-9))
    total = attribution.total(choices)
    if np.ptp(total) == 0:
        return None
    slope, offset = np.polyfit(total, y, 1)
    if slope <= 0:  # the explanation ranks the trials the wrong way round: it predicts nothing
        return None
    return Reading(float(offset), float(slope), float(np.std(y - offset - slope * total, ddof=2)))


@lru_cache(maxsize=1)
def other_sizes(records: Records) -> tuple[Size, ...]:
    """Return the predicted sizes, smallest first; none where a run has no explanation or too few trials."""
    reading = read_values(records)
    if reading is None or records.space is None or records.explanation is None:
        return ()
    space, attribution = records.space, records.explanation[1]
    measured = [t["fid_fp"] for t in records.trials]
    found = []
    for choice in pareto(space, attribution.values, COUNT, forbidden=dominated(space)):
        total = float(attribution.total(choice)[0])
        if not min(measured) / BEYOND <= reading.fid(total) <= max(measured) * BEYOND:
            continue
        bits = int(space.total_bits(choice)[0])
        found.append(
            Size(
                bits=bits / int(space.num_weights.sum()),
                denoiser_bytes=_file_bytes(records, bits),
                fid=reading.fid(total),
                low=reading.fid(total, -2),
                high=reading.fid(total, 2),
            )
        )
    return tuple(found)


def _file_bytes(records: Records, bits: int) -> int:
    """Return the denoiser's bytes at a number of bits for its weights: the rest is as in the recipe's file."""
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
