"""The ways to correct: this project's, and those of others by the same statistics, so that outcomes can be compared."""

from dataclasses import dataclass

import numpy as np

from quantdm.errors import QuantDMError


@dataclass(frozen=True)
class Variant:
    """What a way of correcting uses.

    Args:
        k: whether the significant slope is divided out.
        bias: whether the mean error is taken off.
        room: how a step makes room for the rest (`variance.ROOMS`), None: not at all.
        table: whether gain and bias come from a table of its own (`rival_tables`) instead of k and bias.
    """

    k: bool = False
    bias: bool = False
    room: str | None = None
    table: bool = False


# From nothing to everything; the order in which a fit adds them.
OWN: dict[str, Variant] = {
    "none": Variant(),
    "bias": Variant(bias=True),
    "k": Variant(k=True),
    "both": Variant(k=True, bias=True),
    "variance": Variant(table=True, room="full"),
    "both+variance": Variant(k=True, bias=True, room="full"),
}
RIVALS: dict[str, Variant] = {
    "ptqd": Variant(table=True, room="noise"),
    "mmse": Variant(table=True),
    "stepbaq": Variant(table=True, room="back"),
    "qdrift": Variant(table=True, room="drift"),
    "tac": Variant(table=True),
    "tcec": Variant(table=True),
}
ALL = {**OWN, **RIVALS}
VARIANTS = tuple(OWN)


def variant_of(name: str) -> Variant:
    """Return a way of correcting by its name.

    Raises:
        QuantDMError: there is none of that name.
    """
    if name not in ALL:
        raise QuantDMError(f"correction: got variant {name!r}, expected one of {', '.join(ALL)}")
    return ALL[name]


# TAC's weights of the two regularisers.
TAC_RATIO, TAC_ONE = 0.5, 0.1


def rival_tables(
    mean: np.ndarray, second: np.ndarray, ratios: np.ndarray, slope: float, rest: tuple[float, float]
) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Return gain [C], bias [C] and remaining std of every variant with a table: e = gain (e_quantized - bias).

    Args:
        mean: of output and error, [2, C].
        second: mean products of output and error per channel, [2, 2, C].
        ratios: mean of quantized / output and of its square, [2, C].
        slope: the least-squares slope of the error on the output, significant or not.
        rest: std of the error beside its mean, and beside slope and mean.

    Sources:
        PTQD (arXiv 2305.10657): slope clamped at 0, unbiased inverse. MMSE (D2-DPM): the posterior mean of the output.
        StepbaQ, Q-Drift: the mean is left alone, std of all of the error. TAC: the regularised gain per channel,
        K = [(1-a) q.r + a N sum(q/r) + b N] / [(1-a) q.q + a N sum(q^2/r^2) + b N], here per value. TCEC: a gain per
        channel; where every step takes off all of the error made in it, no accumulated one is left to aim at.
    """
    channels = mean.shape[1]
    ones, zeros = np.ones(channels), np.zeros(channels)
    variance = second - mean[:, None] * mean[None, :]  # [2, 2, C]
    clamped = max(slope, 0.0)
    beside = np.sqrt(max(rest[1] ** 2 + (slope - clamped) ** 2 * variance[0, 0].mean(), 0.0))
    quantized = variance[0, 0] + 2 * variance[0, 1] + variance[1, 1]
    both = variance[0, 0] + variance[0, 1]  # cov(output, quantized)
    shrunk = both.sum() / max(quantized.sum(), np.finfo(np.float64).tiny)
    shrunk = shrunk if abs(shrunk) > 1e-3 else 1.0
    qr = second[0, 0] + second[0, 1]
    qq = second[0, 0] + 2 * second[0, 1] + second[1, 1]
    tac = ((1 - TAC_RATIO) * qr + TAC_RATIO * ratios[0] + TAC_ONE) / (
        (1 - TAC_RATIO) * qq + TAC_RATIO * ratios[1] + TAC_ONE
    )
    return {
        "variance": (ones, zeros, rest[0]),
        "ptqd": (ones / (1 + clamped), mean[1] - clamped * mean[0], float(beside / (1 + clamped))),
        "mmse": (ones * shrunk, mean.sum(axis=0) - mean[0] / shrunk, 0.0),
        "stepbaq": (ones, zeros, rest[0]),
        "qdrift": (ones, zeros, rest[0]),
        "tac": (tac, zeros, 0.0),
        "tcec": (np.where(qq > 0, qr / np.where(qq > 0, qq, 1.0), 1.0), zeros, 0.0),
    }
