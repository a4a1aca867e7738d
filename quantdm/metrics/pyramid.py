"""Features that need no trained network: statistics of colours and edges at several scales."""

import torch
import torch.nn.functional as F

LEVELS = 3
_COLOURS = 4  # with more channels than that it is latents: edges between them tell little, and would be too many


@torch.no_grad()
def pyramid_features(images: torch.Tensor) -> torch.Tensor:
    """Return, per channel: the mean, and at three scales the spread and the mean steepness along both axes.

    They see blur, noise, lost contrast and shifted colours; they do not see what an image shows.

    Args:
        images: [N, C, H, W] in [0, 1], or latents [N, ...]: of more than four channels only mean and spread.

    Returns:
        float32 [N, 10 C] of images of at least 16 pixels a side, fewer of smaller ones; [N, 2 C] of latents.
    """
    x = _as_pictures(images.float())
    found = [x.mean((2, 3)), x.flatten(2).std(2, correction=0)]
    if x.shape[1] > _COLOURS:
        return torch.cat(found, 1)
    for level in range(LEVELS):
        if level:
            x = F.avg_pool2d(x, 2)
            found.append(x.flatten(2).std(2, correction=0))
        found += [x.diff(dim=2).abs().mean((2, 3)), x.diff(dim=3).abs().mean((2, 3))]
        if min(x.shape[2:]) < 8:
            break
    return torch.cat(found, 1)


def _as_pictures(x: torch.Tensor) -> torch.Tensor:
    """Return latents as [N, C, H, W]: tokens [N, T, C] become one column, frames stand below each other."""
    if x.ndim == 3:
        return x.transpose(1, 2)[..., None]
    return x.flatten(2, -2) if x.ndim > 4 else x
