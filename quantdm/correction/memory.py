"""How long quantization noise remembers: the errors of two steps of one trajectory are not independent.

The error is a function of the sample, and the sample changes little from one noisy level to the next. So along a
trajectory errors add up like the steps of an autoregressive process: with correlations of 0.6 between neighbours
they leave four times the variance of independent ones, and a sampler that makes room for the latter makes too little.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from quantdm.correction.variance import Move

# Correlations outside are held at these: a clock cannot stand still, and no correlation is one soon forgotten.
LEAST, MOST = 1e-3, 0.99


def ages(log_snr: Sequence[float], following: Sequence[tuple[float, float]]) -> np.ndarray:
    """Return the time that has passed at every level on the noise's own clock: correlation = exp(-difference).

    Args:
        log_snr: of the levels, increasing, [T].
        following: per level the level that came next and the correlation of its error with this one's; the level
            itself where none came next.

    Returns:
        float64 [T] from 0, increasing; empty (errors are independent) with fewer than two levels.
    """
    levels = np.asarray(log_snr, dtype=np.float64)
    if len(levels) < 2:
        return np.zeros(0)
    rates = np.full(len(levels), np.nan)
    for place, (after, correlation) in enumerate(following):
        if after > levels[place]:
            rates[place] = -math.log(min(max(correlation, LEAST), MOST)) / (after - levels[place])
    known = ~np.isnan(rates)
    if not known.any():
        return np.zeros(0)
    rates = np.interp(levels, levels[known], rates[known])
    return np.concatenate([[0.0], np.cumsum(rates[:-1] * np.diff(levels))])


def age_at(log_snr: np.ndarray, age: np.ndarray, at: float) -> float:
    """Return the age at a log-SNR; beyond the fitted levels the clock goes on at the pace of the outermost ones."""
    if at < log_snr[0] or at > log_snr[-1]:
        near, edge = (1, 0) if at < log_snr[0] else (-2, -1)
        pace = (age[edge] - age[near]) / (log_snr[edge] - log_snr[near])
        return float(age[edge] + pace * (at - log_snr[edge]))
    return float(np.interp(at, log_snr, age))


def with_memory(move: Move, shared: float) -> Move:
    """Return a move whose added variance counts what its error shares with those that the sample carries.

    What the sample carries shrinks with the step, by r = target / sigma; with an error of std a = sqrt(added) and
    `shared` the sum of carried weights x std x correlation, Var(r carried + error) = r^2 Var(carried) + a^2 + 2 r a
    `shared`.
    """
    return replace(move, added=move.added + 2.0 * math.sqrt(move.added) * move.shrink * shared)


def shared_after(move: Move, shared: float, correlated: float) -> float:
    """Return `shared` for the step after a move (without memory), whose error has this correlation with the move's.

    Noise that a sampler injects makes the sample, and with it the error, another one: of the noise at the next level a
    share of target / sigma_next is of before.
    """
    kept = move.target / move.sigma_next if move.sigma_next > 0.0 else 0.0
    return correlated * kept * (move.shrink * shared + math.sqrt(move.added))
