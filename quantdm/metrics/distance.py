"""Features -> statistics -> distance: the Frechet distance, and the paired error of two image sets."""

import math

import torch


def frechet_distance(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    """Return the Frechet distance of two feature sets: |m1-m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    Args:
        features_a: [N, F]; N > F keeps the covariance regular. Compared at equal N only: the distance is biased upward
            at small N (Heusel et al. 2017, equation 6).
        features_b: [M, F].
    """
    mean_a, cov_a = _statistics(features_a)
    mean_b, cov_b = _statistics(features_b)
    # tr (C1 C2)^(1/2) from the symmetric product C1^(1/2) C2 C1^(1/2), which has the same eigenvalues.
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)


def _statistics(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    features = features.double()
    return features.mean(dim=0), torch.cov(features.T)


def psnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Return 10 log10(1 / MSE) in dB of paired images in [0, 1]; infinite for equal images."""
    mse = (images.float() - reference.float()).square().mean().item()
    return math.inf if mse == 0 else -10 * math.log10(mse)


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Return |output - reference|^2 / |reference|^2 (SQNR in dB is -10 log10 of it)."""
    reference = reference.double()
    return ((output.double() - reference).square().sum() / reference.square().sum()).item()
