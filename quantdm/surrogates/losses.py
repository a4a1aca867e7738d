"""Losses that compare rankings: differentiable Spearman, LambdaRank NDCG, and both; also the true NDCG@k.

All take a target r [B] (larger is better) and scores s [B] and return one number to minimise. They do not depend on the
offset or the (positive) scale of the scores.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional as F

RankLoss = Literal["srcc", "ndcg", "hybrid"]
TEMPERATURE = 0.2  # of the soft comparison, in standard deviations of the scores
GAIN_UNIT = 10.0  # r runs from 0 to 50; gains 2^(r / 10) - 1 run from 0 to 31


def rank_loss(kind: RankLoss) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the ranking loss of that name."""
    return {"srcc": srcc_loss, "ndcg": ndcg_loss, "hybrid": hybrid_loss}[kind]


def srcc_loss(r: Tensor, s: Tensor) -> Tensor:
    """Return 1 - Pearson(rank of r, soft rank of s), a differentiable 1 - Spearman."""
    return 1 - _pearson(_average_rank(r), soft_rank(s))


def ndcg_loss(r: Tensor, s: Tensor) -> Tensor:
    """Return the LambdaRank loss: sum over pairs r_i > r_j of |ΔNDCG_ij| · log(1 + exp(s_j - s_i)).

    ΔNDCG_ij is what exchanging i and j in the present ranking would change (Burges 2010, eq. 6); it is a constant of
    the step, so that the gradient is LambdaRank's.
    """
    z = _standardised(s)
    with torch.no_grad():
        gain = torch.exp2(r / GAIN_UNIT) - 1
        position = torch.empty_like(z)
        position[torch.argsort(s, descending=True, stable=True)] = torch.arange(len(s), dtype=z.dtype, device=z.device)
        discount = 1 / torch.log2(position + 2)
        ideal = (torch.sort(gain, descending=True).values * torch.sort(discount, descending=True).values).sum()
        swap = (gain[:, None] - gain[None]).abs() * (discount[:, None] - discount[None]).abs() / ideal.clamp(min=1e-12)
        swap = swap * (r[:, None] > r[None])
        total = swap.sum().clamp(min=1e-12)
    return (swap * F.softplus(z[None] - z[:, None])).sum() / total


def hybrid_loss(r: Tensor, s: Tensor) -> Tensor:
    """Return the mean of the Spearman and the NDCG loss."""
    return (srcc_loss(r, s) + ndcg_loss(r, s)) / 2


def soft_rank(s: Tensor) -> Tensor:
    """Return 1 + sum over the others of sigmoid((s_i - s_j) / τ), with τ in units of the spread: [B] -> [B]."""
    z = _standardised(s)
    return 0.5 + torch.sigmoid((z[:, None] - z[None]) / TEMPERATURE).sum(dim=1)


def relevance(y: ArrayLike, known: ArrayLike) -> NDArray[np.float64]:
    """Return r = 50 · clip((y - q20) / (max - q20), 0, 1), with q20 and max of the labels `known`.

    `known` are the training labels, so nothing about held-out trials enters (docs/method.md, Nested held-out scores).
    """
    labels = np.asarray(known, dtype=np.float64)
    low, high = np.quantile(labels, 0.2), labels.max()
    return 50 * np.clip((np.asarray(y) - low) / max(high - low, 1e-12), 0, 1)


def ndcg(r: ArrayLike, s: ArrayLike, k: int = 10) -> float:
    """Return the true NDCG@k: linear gains r >= 0, ranked by falling score, ties averaged (as scikit-learn does)."""
    from sklearn.metrics import ndcg_score

    return float(ndcg_score(np.asarray(r)[None], np.asarray(s)[None], k=k))


def _average_rank(r: Tensor) -> Tensor:
    return 0.5 + (r[:, None] > r[None]).to(r).sum(dim=1) + (r[:, None] == r[None]).to(r).sum(dim=1) / 2


def _standardised(s: Tensor) -> Tensor:
    return (s - s.mean()) / (s.std(correction=0) + 1e-8)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    return (_standardised(a) * _standardised(b)).mean()
