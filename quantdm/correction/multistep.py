"""Solvers that look back: what the noise of several outputs adds to one update, and the update that makes room for it.

The updates of these solvers are linear in the sample, the outputs and the fresh noise. What each is multiplied with is
read from the update itself, given unit vectors, so that order, solver type and spacing need no formulas here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from quantdm.correction.levels import Level, plain_name
from quantdm.correction.moves import Noise
from quantdm.correction.variance import Move

# Scheduler -> its updates towards the next level, and from the last level to this one (a corrector).
UPDATES: dict[str, tuple[str, ...]] = {
    "DPMSolverMultistepScheduler": (
        "dpm_solver_first_order_update",
        "multistep_dpm_solver_second_order_update",
        "multistep_dpm_solver_third_order_update",
    ),
    "DEISMultistepScheduler": (
        "deis_first_order_update",
        "multistep_deis_second_order_update",
        "multistep_deis_third_order_update",
    ),
    "UniPCMultistepScheduler": ("multistep_uni_p_bh_update", "multistep_uni_c_bh_update"),
}

Weights = dict[int, float]  # number of a step -> what the noise of its output is multiplied with, in x / signal


@dataclass
class History:
    """How much of the noise of which output the sample has, and had at the last level."""

    now: Weights = field(default_factory=dict)
    last: Weights = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """One update: between which entries of `sigmas`, with which weights per step's output and on fresh noise."""

    start: int
    end: int
    outputs: Weights
    fresh: float


def probe(update: Callable[[Sequence[torch.Tensor], torch.Tensor, torch.Tensor], torch.Tensor], count: int) -> list:
    """Return the weights of `count` outputs and of the fresh noise in an update: float [count + 1].

    Args:
        update: takes outputs, sample and noise, and is linear in them.
    """
    unit = torch.eye(count + 2, dtype=torch.float64)
    weights = update([row[None] for row in unit[:count]], unit[count][None], unit[count + 1][None])[0]
    return [*weights[:count].tolist(), float(weights[count + 1])]


def predicts_data(scheduler: Any) -> bool:
    """Say whether a solver keeps predictions of x0 (else of e) in its history."""
    if plain_name(scheduler) == "UniPCMultistepScheduler":
        return scheduler.predict_x0
    return scheduler.config.algorithm_type in ("dpmsolver++", "sde-dpmsolver++")


# The age of the noise at a level (see `memory`); None: errors of steps are independent.
Age = Callable[[Level], float | None]


def move_of_update(
    scheduler: Any,
    update: Update,
    carried: Weights,
    noise: Noise,
    level_at: Callable[[int], Level],
    age: Age,
) -> tuple[Move, Level, Level, Weights]:
    """Return the move of an update, the levels between which it goes, and what noise the sample has after it.

    An output of before is in the sample already, and multistep weights take part of its noise out again; what the
    sample has of it shrinks with the level. So with weights w of the update, noise c in the sample and r = target /
    sigma, the update adds Var(r c + w) - Var(r c), where Var(v) = sum_ij v_i v_j s_i s_j rho_ij, s is the std of the
    kept predictions' noise and rho the correlation of two steps' errors; those of a solver that injects noise are taken
    for independent. `level_at` gives the level of an entry of `sigmas`.
    """
    here, after = level_at(update.start), level_at(update.end)
    spare = (update.fresh / after.signal) ** 2 if after.signal > 0.0 else 0.0
    target = math.sqrt(max(after.sigma**2 - spare, 0.0))
    move = Move(here.sigma, target, after.sigma, 0.0, spare)
    before = {number: move.shrink * weight for number, weight in carried.items()}
    kept = dict(before)
    for number, weight in update.outputs.items():
        kept[number] = kept.get(number, 0.0) + weight / after.signal

    covariance = _covariance([level_at(number) for number in kept], noise, age if spare == 0.0 else lambda _: None)
    if predicts_data(scheduler):
        scale = np.nan_to_num([level_at(number).sigma for number in kept], posinf=0.0)
        covariance = covariance * np.outer(scale, scale)
    rows = [np.array([weights.get(number, 0.0) for number in kept]) for weights in (kept, before)]
    added = float(rows[0] @ covariance @ rows[0] - rows[1] @ covariance @ rows[1])
    return replace(move, added=added), here, after, kept


def _covariance(levels: Sequence[Level], noise: Noise, age: Age) -> np.ndarray:
    """Return the covariance of the errors on e at some levels of one trajectory."""
    std = np.array([noise(level) for level in levels])
    ages = [age(level) for level in levels]
    if any(found is None for found in ages):
        return np.diag(std**2)
    clock = np.array(ages, dtype=np.float64)
    return np.outer(std, std) * np.exp(-abs(clock[:, None] - clock))
