"""Precision per step: how many activation bits each step of a sampler gets, on one weight file.

Bits come from the noise that a network with b-bit activations has at each step (`fit_correction` along the same
trajectories, one correction per b), or from the measured error of whole runs.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from quantdm.correction.record import Correction
from quantdm.correction.variance import epsilon_units
from quantdm.errors import QuantDMError
from quantdm.recipe import ActivationSpec


def ptqd_bits(corrections: Mapping[int, Correction], log_snrs: Sequence[float], *, squared: bool = False) -> list[int]:
    """Return bits per step by PTQD's rule: the fewest with SNR^Q_b(t) > SNR^F(t) = alpha_bar / (1 - alpha_bar).

    Where none has, the most bits. Its SNR^Q is |e| / |error_b|; `squared` reads it as a ratio of powers, as SNR^F is.

    Args:
        corrections: bits -> the statistics of the network with them.
        log_snrs: of the steps.

    Raises:
        QuantDMError: no corrections, or one without the diagnostic `snr` (fit it anew).
    """
    _check(corrections)
    power = 2 if squared else 1
    chosen = []
    for level in log_snrs:
        enough = [b for b, c in corrections.items() if c.diagnostics_at(level)["snr"] ** power > math.exp(level)]
        chosen.append(min(enough, default=max(corrections)))
    return chosen


def budgeted_bits(corrections: Mapping[int, Correction], log_snrs: Sequence[float], mean_bits: float) -> list[int]:
    """Return the bits per step that add least noise variance for a mean number of bits.

    Minimises sum_t w_t q_b(t)^2, exactly. w_t = (e^h - 1)^2 with h half the change of the log-SNR in the step: in
    x / sigma a first-order step adds (sigma / sigma' - 1)^2 q^2, and e^h = sigma / sigma'. The last step has the weight
    of the one before.

    Args:
        corrections: bits -> the statistics of the network with them.
        log_snrs: of the steps, ascending.
        mean_bits: how many on average at most.

    Raises:
        QuantDMError: no corrections, or fewer mean bits than the fewest.
    """
    _check(corrections)
    steps, options = len(log_snrs), sorted(corrections)
    room = math.floor(mean_bits * steps + 1e-9) - options[0] * steps
    if room < 0:
        raise QuantDMError(f"mean_bits: got {mean_bits}, expected {options[0]} or more, the fewest of {options}")
    half = np.diff(log_snrs) / 2.0
    weights = np.expm1(np.append(half, half[-1] if steps > 1 else 1.0)) ** 2
    costs = np.array([[_noise(corrections[b], level) ** 2 for b in options] for level in log_snrs]) * weights[:, None]
    best, taken = np.zeros(room + 1), np.zeros((steps, room + 1), dtype=np.int64)
    for step in range(steps):  # best[r]: least cost of the steps so far with r bits above the fewest
        found = np.full((len(options), room + 1), np.inf)
        for place, bits in enumerate(options):
            extra = bits - options[0]
            if extra <= room:
                found[place, extra:] = best[: room + 1 - extra] + costs[step, place]
        taken[step], best = found.argmin(axis=0), found.min(axis=0)
    left, chosen = room, []
    for step in reversed(range(steps)):
        bits = options[taken[step, left]]
        left -= bits - options[0]
        chosen.append(bits)
    return chosen[::-1]


def measured_bits(
    error: Callable[[Sequence[int]], float], steps: int, low: int, high: int, mean_bits: float, *, runs: int = 12
) -> list[int]:
    """Return bits per step by the measured error of whole runs: ranges that profit most from `high` bits get them.

    The range of steps that profits most is halved until `runs` errors have been measured; errors are taken to add up
    over steps, so what a half gains is measured and the rest is the other's. Then ranges take `high` bits in the order
    of their gain per step, as far as the mean allows.

    Args:
        error: the distance to full precision of a run with these bits per step.
        steps: number of steps.
        low: bits of most steps.
        high: bits of the others.
        mean_bits: how many on average at most.
        runs: how many errors may be measured, 2 or more.
    """
    affordable = math.floor((mean_bits - low) / (high - low) * steps + 1e-9)

    def measured(first: int, last: int) -> float:
        return error([high if first <= step < last else low for step in range(steps)])

    base = error([low] * steps)
    gains = {(0, steps): base - measured(0, steps)}
    for _ in range(runs - 2):
        wide = [span for span in gains if span[1] - span[0] > 1]
        if not wide:
            break
        first, last = max(wide, key=lambda span: gains[span])
        middle = (first + last) // 2
        whole, head = gains.pop((first, last)), base - measured(first, middle)
        gains |= {(first, middle): head, (middle, last): whole - head}
    bits = [low] * steps
    for first, last in sorted(gains, key=lambda span: -gains[span] / (span[1] - span[0])):
        count = min(last - first, affordable) if gains[first, last] > 0 else 0
        bits[first : first + count] = [high] * count
        affordable -= count
    return bits


def spec_of_steps(spec: ActivationSpec, timesteps: Sequence[float], bits: Sequence[int]) -> ActivationSpec:
    """Return activations with these bits per step: buckets of timesteps, so that any number of steps is served.

    Args:
        spec: what holds otherwise; layers with more bits than a bucket keep theirs.
        timesteps: what the denoiser is told at each step, descending.
        bits: of each step; 16: not quantized.

    Raises:
        QuantDMError: not as many bits as timesteps, or static ranges, which have buckets of their own.
    """
    if len(timesteps) != len(bits) or not bits:
        raise QuantDMError(f"bits: got {len(bits)} for {len(timesteps)} timesteps, expected one each")
    if spec.ranges:
        raise QuantDMError("activations: static ranges have buckets of their own; take dynamic ones for bits per step")
    turns = [i for i in range(1, len(bits)) if bits[i] != bits[i - 1]]
    buckets = tuple((float(timesteps[i - 1]) + float(timesteps[i])) / 2.0 for i in turns)
    per_bucket = tuple(int(bits[i]) for i in (0, *turns))
    return ActivationSpec.model_validate({**spec.model_dump(), "buckets": buckets, "bucket_bits": per_bucket})


def _noise(correction: Correction, level: float) -> float:
    """Return the std of all of the error that a correction leaves, in units of e."""
    at = correction.with_variant("both+variance").at(level)
    return at.q * epsilon_units(correction.prediction_type, math.exp(-level / 2.0))


def _check(corrections: Mapping[int, Correction]) -> None:
    if not corrections or any("snr" not in c.diagnostics for c in corrections.values()):
        raise QuantDMError(
            f"bits per step: got corrections for bits {sorted(corrections)}, expected one or more with the diagnostic "
            "'snr'; fit them with `fit_correction`"
        )
