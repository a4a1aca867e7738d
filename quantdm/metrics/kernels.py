"""Kernel distances of features (MMD^2): KID and CMMD, unbiased at any number of images."""

from collections.abc import Callable

import torch

from quantdm.errors import QuantDMError
from quantdm.metrics.distance import check_features

BLOCK = 1024  # rows of a kernel matrix at a time
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. 2024, section 4

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def cubic_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return k(x, y) = (x.y / F + 1)^3 of rows [N, F] and [M, F] (Binkowski et al. 2018, equation 6)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(sigma: float) -> Kernel:
    """Return k(x, y) = exp(-|x - y|^2 / (2 sigma^2))."""
    return lambda x, y: torch.exp(
        -(torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / (2 * sigma**2)
    )


def squared_mmd(
    x: torch.Tensor, y: torch.Tensor, kernel: Kernel, *, unbiased: bool = True, paired: bool = False
) -> float:
    """Return the squared maximum mean discrepancy of features [N, F] and [M, F], in float64.

    Args:
        unbiased: leave an image out of its own mean (Gretton et al. 2012, equation 3): may be negative. Otherwise the
            plain means of equation 5, zero for equal sets.
        paired: rows of one number belong together (equal noises): their cross terms are left out, too, as in Gretton's
            lemma 6. With them the distance of nearly equal sets would be far below zero.

    Raises:
        QuantDMError: fewer than two rows, a feature that is NaN or infinite, or pairs of unequal number.
    """
    check_features(x)
    check_features(y)
    if paired and len(x) != len(y):
        raise QuantDMError(f"pairs: got {len(x)} and {len(y)} images, expected as many")
    if paired and unbiased:
        n = len(x)
        own = sum(kernel(a.double(), b.double()).item() for a, b in zip(x.split(1), y.split(1), strict=True))
        cross = (_total(x, y, kernel) - own) / (n * (n - 1))
        return _within(x, kernel, unbiased) + _within(y, kernel, unbiased) - 2 * cross
    return _within(x, kernel, unbiased) + _within(y, kernel, unbiased) - 2 * _mean(x, y, kernel)


def _mean(x: torch.Tensor, y: torch.Tensor, kernel: Kernel) -> float:
    return _total(x, y, kernel) / (len(x) * len(y))


def _within(x: torch.Tensor, kernel: Kernel, unbiased: bool) -> float:
    if not unbiased:
        return _mean(x, x, kernel)
    own = sum(kernel(row, row).item() for row in x.double().split(1))
    return (_total(x, x, kernel) - own) / (len(x) * (len(x) - 1))


def _total(x: torch.Tensor, y: torch.Tensor, kernel: Kernel) -> float:
    return sum(
        kernel(a.double(), b.double()).sum().item() for a in x.split(BLOCK) for b in y.split(BLOCK)
    )  # blocks: 50,000 x 50,000 kernel values never stand in memory together


def kid(
    x: torch.Tensor, y: torch.Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0, paired: bool = False
) -> tuple[float, float | None]:
    """Return the kernel Inception distance and its standard error: means over subsets of the unbiased cubic MMD^2.

    Args:
        x: features [N, F].
        y: features [M, F].
        subsets: how many, drawn without replacement from each set; sets of no more than `size` images are taken whole,
            once.
        size: images per subset.
        seed: of the drawing.
        paired: rows of one number belong together; see `squared_mmd`.

    Raises:
        QuantDMError: fewer than two rows, a feature that is NaN or infinite, or pairs of unequal number.
    """
    if max(len(x), len(y)) <= size:
        return squared_mmd(x, y, cubic_kernel, paired=paired), None
    rng = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        mine = torch.randperm(len(x), generator=rng)[:size]
        theirs = mine if paired else torch.randperm(len(y), generator=rng)[:size]
        values.append(squared_mmd(x[mine], y[theirs], cubic_kernel, paired=paired))
    found = torch.tensor(values).double()
    return found.mean().item(), found.std().item() / subsets**0.5


def cmmd(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return CMMD of CLIP embeddings: 1000 times the squared MMD of unit vectors under a Gaussian kernel of width 10.

    The plain (biased) means, as its authors have it (Jayasumana et al. 2024, section 4).

    Raises:
        QuantDMError: fewer than two rows, a feature that is NaN or infinite, or an embedding of length zero.
    """
    u, v = (z.double() / z.double().norm(dim=1, keepdim=True) for z in (x, y))
    if not (u.isfinite().all() and v.isfinite().all()):
        raise QuantDMError("features: NaN, infinite or of length zero, expected embeddings that have a direction")
    return CMMD_SCALE * squared_mmd(u, v, gaussian_kernel(CMMD_SIGMA), unbiased=False)
