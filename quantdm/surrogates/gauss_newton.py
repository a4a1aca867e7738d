"""Gauss-Newton descent on squared errors with a Gaussian prior, solved in the dual: parameters may outnumber trials."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
PRECISE, ROUGH = 1e-8, 1e-4  # relative fall of the loss at which a fit ends
NOISE_SD = 0.1  # unit of the penalty: label noise of log(fid_fp), docs/method.md, What was measured
STEPS = 100


class Curve(Protocol):
    """A model of log fid_fp whose parameters are standardised: each is drawn to 0 with unit variance."""

    def start(self, mean: float) -> Floats:
        """Return the parameters at which the prior's mode predicts `mean`."""
        ...

    def log_fid(self, theta: Floats, choices: Ints) -> Floats:
        """Return log fid_fp: [T, L] -> [T]."""
        ...

    def jacobian(self, theta: Floats, choices: Ints) -> Floats:
        """Return d(log fid_fp) / d(theta): [T, parameters]."""
        ...


@dataclass(frozen=True, eq=False)
class Scaled:
    """A curve of parameters that are `scale` times as large: those below 1 are drawn more strongly to 0."""

    inner: Curve
    scale: Floats

    def start(self, mean: float) -> Floats:
        """Return where the prior's mode predicts `mean`."""
        return self.inner.start(mean) / self.scale

    def log_fid(self, theta: Floats, choices: Ints) -> Floats:
        """Return log fid_fp: [T, L] -> [T]."""
        return self.inner.log_fid(self.scale * theta, choices)

    def jacobian(self, theta: Floats, choices: Ints) -> Floats:
        """Return d(log fid_fp) / d(theta): [T, parameters]."""
        return self.inner.jacobian(self.scale * theta, choices) * self.scale


def solve(curve: Curve, choices: Ints, target: Floats, weights: Floats, strength: float) -> Floats:
    """Minimise sum_t weight · (log fid_fp - target)^2 / NOISE_SD^2 + strength · |theta|^2 by Gauss-Newton.

    Each step is solved in the dual (trials x trials); a step that does not descend is halved.
    """
    return _descend(curve, choices, target, weights, strength, _start(curve, target, weights), PRECISE)


def solve_path(
    curve: Curve, choices: Ints, target: Floats, weights: Floats, strengths: Sequence[float]
) -> list[Floats]:
    """Solve for several strengths, the strongest first, each from the one before, well enough to compare them."""
    theta, found = _start(curve, target, weights), {}
    for strength in sorted(strengths, reverse=True):
        theta = found[strength] = _descend(curve, choices, target, weights, strength, theta, ROUGH)
    return [found[strength] for strength in strengths]


def _start(curve: Curve, target: Floats, weights: Floats) -> Floats:
    return curve.start(float(np.average(target, weights=weights)))


def _descend(
    curve: Curve, choices: Ints, target: Floats, weights: Floats, strength: float, theta: Floats, tolerance: float
) -> Floats:
    root = np.sqrt(weights) / NOISE_SD

    def loss(candidate: Floats) -> tuple[float, Floats]:
        residual = root * (curve.log_fid(candidate, choices) - target)
        return float(residual @ residual + strength * candidate @ candidate), residual

    value, residual = loss(theta)
    for _ in range(STEPS):
        jacobian = root[:, None] * curve.jacobian(theta, choices)
        kernel = jacobian @ jacobian.T + strength * np.eye(len(residual))
        step = -jacobian.T @ np.linalg.solve(kernel, residual - jacobian @ theta) - theta
        size = 1.0
        while size > 1e-4:
            trial_value, trial_residual = loss(theta + size * step)
            if trial_value < value:
                break
            size /= 2
        else:
            break
        done = value - trial_value < tolerance * value
        theta, value, residual = theta + size * step, trial_value, trial_residual
        if done:
            break
    return theta
