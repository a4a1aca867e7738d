"""Paired figures, one per image: how far two images of one noise are apart."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

MAX_PSNR = 100.0  # dB: what an equal pair counts as in a mean over pairs


def psnr_each(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return 10 log10(1 / MSE) in dB per pair of images [N, C, H, W] in [0, 1], 100 dB at most, float64 [N]."""
    mse = (a.double() - b.double()).square().flatten(1).mean(1)
    return (-10 * mse.clamp(min=10 ** (-MAX_PSNR / 10)).log10()).clamp(max=MAX_PSNR)


def ssim_each(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the structural similarity per pair (Wang et al. 2004; Gaussian window of 11), float64 [N].

    Images smaller than the window are compared with the largest odd window that fits.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # heavy, and only needed here

    side = min(11, *a.shape[2:])
    found = structural_similarity_index_measure(
        a.double(), b.double(), gaussian_kernel=side == 11, kernel_size=side - 1 + side % 2, data_range=1.0,
        reduction="none",
    )  # fmt: skip
    return (found[0] if isinstance(found, tuple) else found).reshape(len(a))


def cosine_each(features: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a function that gives the cosine of the features of each pair, float64 [N]."""
    return lambda a, b: F.cosine_similarity(features(a).double(), features(b).double())
