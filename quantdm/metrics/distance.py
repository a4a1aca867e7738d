"""Features -> statistics -> distance: the Frechet distance, and the paired error of two image sets."""

import math

import torch

from quantdm.errors import QuantDMError
from quantdm.metrics.moments import Moments, check_same_ruler


def frechet_distance(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    """Return the Frechet distance of two feature sets: |m1-m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    Args:
        features_a: [N, F]; N > F keeps the covariance regular. Compared at equal N only: the distance is biased upward
            at small N (Heusel et al. 2017, equation 6).
        features_b: [M, F].

    Raises:
        QuantDMError: fewer than two rows, or a feature that is NaN or infinite.
    """
    return _frechet(*_statistics(features_a), *_statistics(features_b))


def frechet_of_moments(a: Moments, b: Moments) -> float:
    """Return the Frechet distance of two feature sets from their sums.

    Raises:
        QuantDMError: fewer than two images, or statistics of different features or resizes.
    """
    check_same_ruler(a, b)
    return _frechet(a.mean, a.covariance, b.mean, b.covariance)


def frechet_of_gaussians(mean_a: torch.Tensor, cov_a: torch.Tensor, mean_b: torch.Tensor, cov_b: torch.Tensor) -> float:
    """Return the Frechet distance of two Gaussians, means [F] and covariances [F, F] in float64."""
    return _frechet(mean_a, cov_a, mean_b, cov_b)


def _frechet(mean_a: torch.Tensor, cov_a: torch.Tensor, mean_b: torch.Tensor, cov_b: torch.Tensor) -> float:
    # tr (C1 C2)^(1/2) from the symmetric product C1^(1/2) C2 C1^(1/2), which has the same eigenvalues.
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    del vectors  # of 2,048 features every matrix takes 34 MB
    product = root @ cov_b @ root
    del root
    cross = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)


def check_features(features: torch.Tensor) -> None:
    """Check that features [N, F] have a covariance.

    Raises:
        QuantDMError: fewer than two rows, or a feature that is NaN or infinite.
    """
    if len(features) < 2:
        raise QuantDMError(f"features: got {len(features)} images, expected at least 2: one has no covariance")
    bad = ~features.isfinite().all(dim=1)
    if bad.any():
        raise QuantDMError(
            f"features: NaN or infinite for {int(bad.sum())} of {len(bad)} images, first image "
            f"{int(bad.int().argmax())}; expected numbers: look at it, and whether the extractor computes in float16"
        )


def _statistics(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    check_features(features)
    features = features.double()
    return features.mean(dim=0), torch.cov(features.T)


def psnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Return 10 log10(1 / MSE) in dB of paired images in [0, 1]; infinite for equal images.

    Raises:
        QuantDMError: a pixel is NaN or infinite.
    """
    mse = _finite((images.float() - reference.float()).square().mean().item(), "psnr")
    return math.inf if mse == 0 else -10 * math.log10(mse)


def psnr_of_bytes(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the PSNR in dB of paired uint8 images, summed exactly, image by image; infinite for equal images."""
    error = sum(int((a.int() - b.int()).square().sum()) for a, b in zip(images, reference, strict=True))
    return math.inf if error == 0 else 10 * math.log10(255**2 * images.numel() / error)


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Return |output - reference|^2 / |reference|^2 (SQNR in dB is -10 log10 of it).

    Raises:
        QuantDMError: an element is NaN or infinite, or the reference is zero and the output is not.
    """
    reference = reference.double()
    error, whole = (output.double() - reference).square().sum().item(), reference.square().sum().item()
    return 0.0 if error == 0 else _finite(error / whole if whole else math.inf, "relative error")


def _finite(value: float, what: str) -> float:
    if not math.isfinite(value):
        raise QuantDMError(f"{what}: got {value}, expected a number: NaN or infinite values went into it")
    return value
