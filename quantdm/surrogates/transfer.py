"""What trials of other denoisers say of a new one: the additive surrogate with shared effects, learned hierarchically.

Every parameter of the additive surrogate is standardised. Those that have a name in every denoiser (exponent, floor and
slope of the curve; effects of roles, depth bands, methods, widths, options and pairs of role and option) are theta_d =
sqrt(1 - rho) · mu + sqrt(rho) · delta_d, mu shared and delta_d the denoiser's own; cells and layers are own. Donors
tell of mu by the curvature of their likelihood (Laplace), and what mu says is the Gaussian prior of the new denoiser:
with no trial of it, it predicts by the mean alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantdm.errors import QuantDMError
from quantdm.surrogates.additive_model import AdditiveCurve, Design, Floats, Ints, make_design
from quantdm.surrogates.features import band_index
from quantdm.surrogates.gauss_newton import NOISE_SD, solve
from quantdm.surrogates.roles import role_of
from quantdm.surrogates.space import SearchSpace
from quantdm.surrogates.trials import split_folds

STRENGTHS, RHOS = (0.3, 1.0, 3.0, 10.0), (0.1, 0.3, 0.6)
ZERO_RHO = 0.3  # of a prediction without trials
FOLDS = 5


@dataclass(frozen=True, eq=False)
class Donor:
    """What one denoiser's trials say: names of its parameters (None: its own), curvature [P, P] and linear term [P]."""

    names: tuple[str | None, ...]
    curvature: Floats
    linear: Floats


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


def role_curve(space: SearchSpace) -> AdditiveCurve:
    """Return the additive model of a space with roles in the place of operation types."""
    return AdditiveCurve(make_design(space, kinds=[role_of(layer) for layer in space.layers]))


def shared_names(space: SearchSpace, design: Design) -> tuple[str | None, ...]:
    """Return what every parameter is called in all denoisers; None: it is this denoiser's own."""
    roles = list(dict.fromkeys(role_of(layer) for layer in space.layers))
    bands = int(band_index(space).max()) + 1
    named = [*(f"role {role}" for role in roles), *(f"band {band}" for band in range(bands))]
    own = design.layer.shape[1] - len(named)
    methods = [f"method {o.method} {o.granularity} {o.group_size}" for o in space.options]
    columns = max(methods.index(method) for method in methods) + 1  # a method's column is its first option's
    by_method = [name if methods.index(name) == index else None for index, name in enumerate(methods[:columns])]
    widths = sorted({o.bits for o in space.options})
    options = [*by_method, *(f"width {w}" for w in widths), *(f"option {label}" for label in space.labels)]
    pairs = [f"{role} under {label}" for role in roles for label in space.labels]
    return (None, "slope", "exponent", "floor", *named, *[None] * own, *options, *pairs)


def learn(space: SearchSpace, choices: Ints, y: Floats, *, strength: float = 1.0) -> Donor:
    """Fit a donor's trials [T, L], y [T] and return what they say."""
    curve, weights = role_curve(space), np.ones(len(y))
    theta = solve(curve, choices, -y, weights, strength)
    slope = curve.jacobian(theta, choices) / NOISE_SD
    curvature = slope.T @ slope
    return Donor(shared_names(space, curve.design), curvature, curvature @ theta + strength * theta)


def prior_of(space: SearchSpace, donors: Sequence[Donor], rho: float) -> Moved:
    """Return the curve of a new denoiser under the prior that donors leave; without donors, the plain one.

    Raises:
        QuantDMError: no donor shares an option with the space: it is a run of another options set.
    """
    curve = role_curve(space)
    names = shared_names(space, curve.design)
    wanted = {f"option {label}" for label in space.labels}
    for donor in donors:
        if not wanted & set(donor.names):
            theirs = [name.removeprefix("option ") for name in donor.names if name and name.startswith("option ")]
            raise QuantDMError(
                f"learned from: that run measured {', '.join(theirs[:3])}..., and none of the options of this one "
                f"({', '.join(space.labels[:3])}...); give a run with the same options"
            )
    known = list(dict.fromkeys(name for donor in donors for name in donor.names if name is not None))
    place = {name: index for index, name in enumerate(known)}
    information, pulled = np.eye(len(known)), np.zeros(len(known))
    for donor in donors:
        at = np.array([-1 if name is None else place[name] for name in donor.names])
        loose = np.where(at < 0, 1.0, rho)  # variance that is the donor's own
        inner = np.linalg.solve(donor.curvature + np.diag(1 / loose), np.column_stack([donor.curvature, donor.linear]))
        told = donor.curvature - donor.curvature @ inner[:, :-1]
        said = donor.linear - donor.curvature @ inner[:, -1]
        rows = np.flatnonzero(at >= 0)
        information[np.ix_(at[rows], at[rows])] += (1 - rho) * told[np.ix_(rows, rows)]
        pulled[at[rows]] += np.sqrt(1 - rho) * said[rows]
    spread = np.linalg.inv(information)
    mean, covariance = np.zeros(len(names)), np.eye(len(names))
    mine = np.array([index for index, name in enumerate(names) if name in place], dtype=np.int64)
    theirs = np.array([place[name] for name in names if name in place], dtype=np.int64)
    mean[mine] = np.sqrt(1 - rho) * (spread @ pulled)[theirs]
    covariance[np.ix_(mine, mine)] = (1 - rho) * spread[np.ix_(theirs, theirs)] + rho * np.eye(len(mine))
    return Moved(curve, mean, np.linalg.cholesky(covariance))


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
