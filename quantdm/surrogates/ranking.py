"""How well predictions rank."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantdm.surrogates.additive_model import Floats, Ints


def spearman(a: Sequence[float] | NDArray[np.float64], b: Sequence[float] | NDArray[np.float64]) -> float:
    """Return Spearman's rank correlation; 0 when one side is constant (it ranks nothing)."""
    from scipy.stats import rankdata

    rank_a, rank_b = rankdata(a), rankdata(b)
    if np.ptp(rank_a) == 0 or np.ptp(rank_b) == 0:
        return 0.0
    return float(np.corrcoef(rank_a, rank_b)[0, 1])


def judge_folds(held_out: Floats, labels: Floats, folds: list[Ints]) -> tuple[list[float], list[float]]:
    """Return Spearman's correlation and NDCG@10 of every fold's held-out predictions."""
    known = [np.delete(labels, fold) for fold in folds]
    gains = [relevance(labels[fold], rest) for fold, rest in zip(folds, known, strict=True)]
    return (
        [spearman(held_out[fold], labels[fold]) for fold in folds],
        [ndcg(gain, held_out[fold]) for fold, gain in zip(folds, gains, strict=True)],
    )


def relevance(y: ArrayLike, known: ArrayLike) -> NDArray[np.float64]:
    """Return r = 50 · clip((y - q20) / (max - q20), 0, 1), with q20 and max of the labels `known`.

    `known` are the training labels, so nothing about held-out trials enters (docs/method.md, Surrogates).
    """
    labels = np.asarray(known, dtype=np.float64)
    low, high = np.quantile(labels, 0.2), labels.max()
    return 50 * np.clip((np.asarray(y) - low) / max(high - low, 1e-12), 0, 1)


def ndcg(r: ArrayLike, s: ArrayLike, k: int = 10) -> float:
    """Return the true NDCG@k: linear gains r >= 0, ranked by falling score, ties averaged (as scikit-learn does)."""
    from sklearn.metrics import ndcg_score

    return float(ndcg_score(np.asarray(r)[None], np.asarray(s)[None], k=k))
