"""Precision, recall, density and coverage of features, by their nearest neighbours."""

import torch

from quantdm.errors import QuantDMError
from quantdm.metrics.distance import check_features

BLOCK = 1024  # rows of a distance matrix at a time
NEAREST = 5


def neighbour_figures(made: torch.Tensor, real: torch.Tensor, *, nearest: int = NEAREST) -> dict[str, float]:
    """Return precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Args:
        made: features [N, F] of the images that are judged.
        real: features [M, F] of the images they are judged by.
        nearest: k; the ball of an image reaches to its k-th nearest neighbour in its own set.

    Returns:
        precision: share of made images in the ball of any real one. recall: share of real images in the ball of any
        made one. density: real balls that a made image lies in, over k. coverage: share of real images in whose ball a
        made one lies.

    Raises:
        QuantDMError: no more than k rows, or a feature that is NaN or infinite.
    """
    for features in (made, real):
        check_features(features)
        if len(features) <= nearest:
            raise QuantDMError(
                f"images: got {len(features)}, expected more than {nearest}: precision and its like need {nearest} "
                "neighbours of every image"
            )
    reach_real, reach_made = _reach(real, nearest), _reach(made, nearest)
    inside_real, covered, recalled = [], torch.zeros(len(real)).bool(), torch.zeros(len(real)).bool()
    for start in range(0, len(made), BLOCK):
        distance = torch.cdist(made[start : start + BLOCK].double(), real.double())
        hit = distance <= reach_real
        inside_real.append(hit.sum(1))
        covered |= hit.any(0)
        recalled |= (distance <= reach_made[start : start + BLOCK, None]).any(0)
    balls = torch.cat(inside_real).double()
    return {
        "precision": (balls > 0).double().mean().item(),
        "recall": recalled.double().mean().item(),
        "density": balls.mean().item() / nearest,
        "coverage": covered.double().mean().item(),
    }


def _reach(features: torch.Tensor, nearest: int) -> torch.Tensor:
    """Return the distance of every image to its k-th nearest neighbour in the set, [N]."""
    whole = features.double()
    # the nearest of all is the image itself
    return torch.cat([torch.cdist(x, whole).kthvalue(nearest + 1, dim=1).values for x in whole.split(BLOCK)])
