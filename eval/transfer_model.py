"""The prior that donors leave, as a curve to be fitted to few trials: what the transfer study judges."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantdm.surrogates.additive_model import AdditiveCurve, Floats, Ints
from quantdm.surrogates.gauss_newton import solve
from quantdm.surrogates.space import SearchSpace
from quantdm.surrogates.transfer import Donor, role_curve, share, shared_names
from quantdm.surrogates.trials import split_folds

STRENGTHS, RHOS, FOLDS = (0.3, 1.0, 3.0, 10.0), (0.1, 0.3, 0.6), 5


@dataclass(frozen=True, eq=False)
class Moved:
    """A curve whose parameters are m + factor · z, z standardised: the Gaussian prior that donors leave."""

    inner: AdditiveCurve
    centre: Floats
    factor: Floats

    def start(self, mean: float) -> Floats:
        """Return z = 0 but for the level, at which the prior's mode predicts about `mean`."""
        z = np.zeros(len(self.centre))
        z[0] = self.inner.start(mean)[0] / self.factor[0, 0]
        return z

    def log_fid(self, theta: Floats, choices: Ints) -> Floats:
        """Return log fid_fp: [T, L] -> [T]."""
        return self.inner.log_fid(self.centre + self.factor @ theta, choices)

    def jacobian(self, theta: Floats, choices: Ints) -> Floats:
        """Return d(log fid_fp) / dz: [T, parameters]."""
        return self.inner.jacobian(self.centre + self.factor @ theta, choices) @ self.factor


def prior_of(space: SearchSpace, donors: Sequence[Donor], rho: float) -> Moved:
    """Return the curve of a new denoiser under the prior that donors leave."""
    curve, told = role_curve(space), share(donors, rho=rho)
    names, place = shared_names(space, curve.design), {name: index for index, name in enumerate(told.names)}
    mean, covariance = np.zeros(len(names)), np.eye(len(names))
    mine = np.array([index for index, name in enumerate(names) if name in place], dtype=np.int64)
    theirs = np.array([place[name] for name in names if name in place], dtype=np.int64)
    mean[mine] = told.mean[theirs]
    covariance[np.ix_(mine, mine)] = told.covariance[np.ix_(theirs, theirs)]
    return Moved(curve, mean, np.linalg.cholesky(covariance).astype(np.float64))


def fit_few(curves: Sequence[Moved], choices: Ints, y: Floats, *, seed: int = 0) -> tuple[Moved, Floats]:
    """Fit the curve and strength of least held-out error to few trials; return the curve and its parameters."""
    weights, folds = np.ones(len(y)), split_folds(len(y), FOLDS, seed)
    errors = {}
    for index, curve in enumerate(curves):
        for strength in STRENGTHS:
            errors[index, strength] = 0.0
            for fold in folds:
                rest = np.setdiff1d(np.arange(len(y)), fold)
                theta = solve(curve, choices[rest], -y[rest], weights[rest], strength)
                errors[index, strength] += float(((curve.log_fid(theta, choices[fold]) + y[fold]) ** 2).sum())
    index, strength = min(errors, key=lambda key: errors[key])
    return curves[index], solve(curves[index], choices, -y, weights, strength)
