"""What trials of other denoisers say of a new one: the additive surrogate with shared effects, learned hierarchically.

Every parameter of the additive surrogate is standardised. Those that have a name in every denoiser (exponent, floor and
slope of the curve; effects of roles, depth bands, methods, widths, options and pairs of role and option) are theta_d =
sqrt(1 - rho) · mu + sqrt(rho) · delta_d, mu shared and delta_d the denoiser's own; cells and layers are own. Donors
tell of mu by the curvature of their likelihood (Laplace), and what mu says is the Gaussian prior of the new denoiser:
with no trial of it, it predicts by the mean alone. Measured in eval/transfer_study.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quantdm.surrogates.additive_model import AdditiveCurve, Design, Floats, Ints, log_terms, make_design, method_name
from quantdm.surrogates.features import band_index
from quantdm.surrogates.gauss_newton import NOISE_SD, solve
from quantdm.surrogates.roles import role_of
from quantdm.surrogates.space import SearchSpace

RHO = 0.3  # of the variance of a shared parameter that is a denoiser's own; set before anything was measured


@dataclass(frozen=True, eq=False)
class Donor:
    """What one denoiser's trials say: names of its parameters (None: its own), curvature [P, P] and linear term [P]."""

    names: tuple[str | None, ...]
    curvature: Floats
    linear: Floats


def role_curve(space: SearchSpace) -> AdditiveCurve:
    """Return the additive model of a space with roles in the place of operation types."""
    return AdditiveCurve(make_design(space, kinds=[role_of(layer) for layer in space.layers]))


def shared_names(space: SearchSpace, design: Design) -> tuple[str | None, ...]:
    """Return what every parameter is called in all denoisers; None: it is this denoiser's own."""
    roles = list(dict.fromkeys(role_of(layer) for layer in space.layers))
    bands = int(band_index(space).max()) + 1
    named = [*(f"role {role}" for role in roles), *(f"band {band}" for band in range(bands))]
    own = design.layer.shape[1] - len(named)
    methods = [method_name(option) for option in space.options]
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


@dataclass(frozen=True, eq=False)
class Shared:
    """What donors say of a new denoiser's shared parameters: names, mean [N] and covariance [N, N]."""

    names: tuple[str, ...]
    mean: Floats
    covariance: Floats


def share(donors: Sequence[Donor], *, rho: float = RHO) -> Shared:
    """Return what donors say of another denoiser; without donors, nothing."""
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
    covariance = (1 - rho) * spread + rho * np.eye(len(known))
    return Shared(tuple(known), np.sqrt(1 - rho) * (spread @ pulled), covariance)


def values_by(space: SearchSpace, effects: Mapping[str, float]) -> Floats:
    """Return what every option of every layer is worth by effects that others taught, larger is better: [L, O].

    Minus the terms of the cost: the best choice by them is the best by the prediction without trials.
    """
    curve = role_curve(space)
    theta = np.array([0.0 if name is None else effects.get(name, 0.0) for name in shared_names(space, curve.design)])
    return -np.exp(log_terms(curve.design, theta))
