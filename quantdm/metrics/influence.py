"""What each image adds to a Frechet distance, to first order: makes its bootstrap as cheap as that of a mean."""

import torch

from quantdm.metrics.distance import check_features

TINY = 1e-10  # of the largest eigenvalue: directions in which a set has no spread


def frechet_influence(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the influence of every row of both sets on their Frechet distance, float64 [N] and [M], means zero.

    d(P, Q) changes by eps times the influence when a share eps of P is moved onto one image: with the optimal transport
    T = C_P^(-1/2) (C_P^(1/2) C_Q C_P^(1/2))^(1/2) C_P^(-1/2) the gradient in C_P is I - T, in m_P 2 (m_P - m_Q)
    (Bures 1969; own derivation of the influence: Hampel 1974, section 2).

    Args:
        x: features [N, F].
        y: features [M, F].

    Raises:
        QuantDMError: fewer than two rows, or a feature that is NaN or infinite.
    """
    check_features(x)
    check_features(y)
    x, y = x.double(), y.double()
    means, covs = [z.mean(0) for z in (x, y)], [torch.cov(z.T, correction=0) for z in (x, y)]
    found = []
    for own, other, z in ((0, 1, x), (1, 0, y)):
        d = z - means[own]
        gradient = torch.eye(z.shape[1]).double() - _transport(covs[own], covs[other])
        quadratic = ((d @ gradient) * d).sum(1)
        found.append(2 * d @ (means[own] - means[other]) + quadratic - quadratic.mean())
    return found[0], found[1]


def _transport(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the optimal transport of covariance a onto covariance b; zero where a has no spread."""
    values, vectors = torch.linalg.eigh(a)
    there = values > TINY * values[-1]
    root = torch.where(there, values, 0).clamp(min=0).sqrt()
    inverse = torch.where(there, 1 / root.clamp(min=1e-300), 0)
    half, half_inverse = (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T
    inner, basis = torch.linalg.eigh(half @ b @ half)
    middle = (basis * inner.clamp(min=0).sqrt()) @ basis.T
    return half_inverse @ middle @ half_inverse
