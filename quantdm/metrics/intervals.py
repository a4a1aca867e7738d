"""How sure a difference is: paired bootstrap over images, t interval over draws; a distance without its bias."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy import stats

from quantdm.errors import QuantDMError, counted
from quantdm.metrics.distance import frechet_of_moments
from quantdm.metrics.moments import Moments

RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """An estimate with the interval that holds the true value with probability `level`."""

    estimate: float
    low: float
    high: float
    level: float
    over: str  # what was drawn anew: "1,000 resamples of 500 images", "3 draws"

    @property
    def clear(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


def bootstrap_interval(
    statistic: Callable[[list[torch.Tensor]], float],
    images: Sequence[int],
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the bootstrap interval of a figure, images drawn with replacement within each draw.

    For a difference of two rows the statistic takes the SAME images of both: what the noises share cancels.

    Args:
        statistic: from the indices of the images of each draw to the figure.
        images: how many each draw has.
        resamples: how often images are drawn anew.
        level: probability.
        seed: of the drawing.

    Returns:
        Percentiles, widened for few images (Hesterberg 2015, section 3.4) and moved so that they surround the estimate:
        drawing with replacement raises a Frechet distance, and that is no part of its uncertainty.

    Raises:
        QuantDMError: fewer than two images, or fewer than 20 resamples.
    """
    total = sum(images)
    if min(images, default=0) < 2 or resamples < 20:
        raise QuantDMError(
            f"bootstrap: got {list(images)} images and {resamples} resamples, expected 2 images in each draw and 20 "
            "resamples or more"
        )
    estimate = statistic([torch.arange(n) for n in images])
    rng = torch.Generator().manual_seed(seed)
    found = [statistic([torch.randint(n, (n,), generator=rng) for n in images]) for _ in range(resamples)]
    again = torch.tensor(found, dtype=torch.float64)
    tail = (1 - level) / 2
    tail = float(stats.norm.cdf(math.sqrt(total / (total - 1)) * stats.t.ppf(tail, total - 1)))
    low, high = torch.quantile(again, torch.tensor([tail, 1 - tail]).double()).tolist()
    shift = estimate - again.mean().item()
    return Interval(estimate, low + shift, high + shift, level, f"{resamples:,} resamples of {total:,} images")


def draws_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """Return the t interval of the mean of one value per draw: what draws say that share nothing but the rows.

    Raises:
        QuantDMError: fewer than two draws.
    """
    if len(values) < 2:
        raise QuantDMError(f"draws: got {len(values)}, expected 2 or more: one draw has no spread")
    x = torch.tensor(values, dtype=torch.float64)
    mean = x.mean().item()
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 1)) * x.std().item() / math.sqrt(len(x))
    return Interval(mean, mean - half, mean + half, level, f"{counted(len(x), 'draw')}")


def paired_interval(
    differences: Sequence[float], influences: Sequence[Sequence[float]], *, level: float = 0.95
) -> Interval:
    """Return the interval of a mean difference of two rows from what every image adds to it, to first order.

    It is the interval that the paired bootstrap approximates (delta method; Efron & Tibshirani 1993, chapter 22), at
    the cost of a mean, and needs no second draw.

    Args:
        differences: of the two rows, one per draw.
        influences: of the images of each draw on its difference, see `frechet_influence`.
        level: probability.

    Raises:
        QuantDMError: no draw, or one of fewer than two images.
    """
    sizes = [len(each) for each in influences]
    if not differences or len(sizes) != len(differences) or min(sizes) < 2:
        raise QuantDMError(
            f"interval: got {len(differences)} differences of draws of {sizes} images, expected as many draws, two "
            "images or more in each"
        )
    variances = [torch.tensor(each, dtype=torch.float64).var().item() / len(each) for each in influences]
    mean = sum(differences) / len(differences)
    freedom = sum(sizes) - len(sizes)
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * math.sqrt(sum(variances)) / len(differences)
    return Interval(mean, mean - half, mean + half, level, f"{sum(sizes):,} pairs of images")


def frechet_infinity(
    features: torch.Tensor, reference: Moments, *, points: int = 15, smallest: float = 0.2, seed: int = 0
) -> tuple[float, float]:
    """Return the Frechet distance at infinitely many images, by a line in 1/N, and the standard error of that.

    Each point takes N images of the set, N from a share of all to all of them (Chong & Forsyth 2020, section 4); what
    the reference's own size adds stays.

    Args:
        features: [N, F] of the images that are judged.
        reference: what they are compared with.
        points: how many sizes.
        smallest: share of the images that the smallest has.
        seed: of the choice of images.

    Raises:
        QuantDMError: too few images for points of different sizes.
    """
    sizes = torch.linspace(smallest * len(features), len(features), points).round().long()
    fewest = max(math.ceil((points - 1) / (1 - smallest)), math.ceil(2 / smallest))
    if len(features) < fewest:
        raise QuantDMError(f"images: got {len(features)}, expected {fewest} or more to extrapolate")
    rng = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes.tolist():
        some = torch.randperm(len(features), generator=rng)[:size]
        found.append(frechet_of_moments(Moments.of(features[some], ruler=reference.ruler), reference))
    line = stats.linregress(1 / sizes.double().numpy(), found)
    return float(line.intercept), float(line.intercept_stderr)  # pyright: ignore[reportAttributeAccessIssue]
