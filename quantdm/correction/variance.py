"""What quantization noise of a known variance adds in one sampling step: closed forms on plain numbers.

Every sampler in one pair of coordinates: x = signal (x0 + sigma e), so x / signal moves along a straight line from
sigma to `target`, takes fresh noise of variance `spare`, and the sampler goes on as if at `sigma_next`. Variances here
are those of x / signal; q is the standard deviation of the noise that remains on the prediction of e.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

# The deterministic step is first order: it is taken only while the excess it compensates is small against sigma_next^2.
EXCESS_LIMIT = 0.5
MAX_LOG_SNR = 27.6  # where alpha_bar is 1e-12 from its end


def log_snr(sigma: float) -> float:
    """Return -2 log sigma, held finite where a schedule ends at pure noise or at pure signal."""
    if sigma <= 0.0:
        return MAX_LOG_SNR
    return min(max(-2.0 * math.log(sigma), -MAX_LOG_SNR), MAX_LOG_SNR)


# std of e over that of the network's output: e.g. v = s e - n x0 with s^2 + n^2 = 1, so at a given x, e = s v + n x.
_UNITS: dict[str, Callable[[float], float]] = {
    "epsilon": lambda sigma: 1.0,
    "v_prediction": lambda sigma: 1.0 / math.sqrt(1.0 + sigma**2),
    "sample": lambda sigma: 1.0 / sigma if sigma > 0.0 else 0.0,  # no noise: no epsilon either
    "flow_prediction": lambda sigma: 1.0 / (1.0 + sigma),
}


def epsilon_units(prediction_type: str, sigma: float) -> float:
    """Return the factor that turns a standard deviation of the network's output into one of e.

    It is 0 for the preconditioned outputs of EDM and of consistency models, of which only the mean is corrected.
    """
    return _UNITS[prediction_type](sigma) if prediction_type in _UNITS else 0.0


def ddim_variance(sigma: float, sigma_next: float, eta: float) -> float:
    """Return the variance that DDIM injects (Song et al. 2021, equation 16), in x / signal at the next level."""
    if not 0.0 < sigma_next < sigma:
        return 0.0
    share = 1.0 if math.isinf(sigma) else 1.0 - (sigma_next / sigma) ** 2
    return (eta * sigma_next) ** 2 * share


def kept_std(spare: float | torch.Tensor, added: float) -> float | torch.Tensor:
    """Return sigma' / sigma with sigma'^2 = max(spare - added, 0): noise kept + absorbed = the schedule's (PTQD)."""
    if isinstance(spare, torch.Tensor):
        return (1.0 - added / spare).clamp(min=0.0).sqrt()
    return math.sqrt(max(1.0 - added / spare, 0.0)) if spare > 0.0 else 1.0


def stretch(sigma: float, target: float, sigma_next: float, added: float) -> float:
    """Return how much longer to make a step so that its total variance is that of the next level.

    The factor f solves (sigma + f (target - sigma))^2 + f^2 added = sigma_next^2; for a first-order deterministic step
    (target = sigma_next, added = (sigma - sigma_next)^2 q^2) that is a step to the level
    sigma' = (sigma q^2 + sqrt(D)) / (1 + q^2), D = sigma^2 q^4 - (1 + q^2)(q^2 sigma^2 - sigma_next^2).
    Where there is no such factor, or the excess is not small, it is 1: the scheduler's own step. The formula's
    minimum-variance step instead would wreck the samples.
    """
    length = sigma - target
    if added == 0.0 or not math.isfinite(sigma) or length <= 0.0 or abs(added) > EXCESS_LIMIT * sigma_next**2:
        return 1.0
    total = length**2 + added
    disc = (sigma * length) ** 2 - total * (sigma**2 - sigma_next**2)
    return (sigma * length - math.sqrt(disc)) / total if disc >= 0.0 and total > 0.0 else 1.0


@dataclass(frozen=True)
class Move:
    """One step of a sampler in x / signal: from sigma to target, plus noise of variance `spare`; on from sigma_next.

    `added` is the variance that the quantization noise adds in the step as the scheduler takes it. `spare` is a tensor
    where a network predicts it.
    """

    sigma: float
    target: float
    sigma_next: float
    added: float
    spare: float | torch.Tensor = 0.0

    @property
    def shrink(self) -> float:
        """What is left after the step of noise that the sample carries: target / sigma."""
        return self.target / self.sigma if 0.0 < self.sigma < math.inf else 0.0

    @property
    def has_spare(self) -> bool:
        """Whether the sampler injects noise in this step."""
        return isinstance(self.spare, torch.Tensor) or self.spare > 0.0

    @property
    def occupancy(self) -> float:
        """The variance that is added over what there is room for: the injected one, else that of the next level."""
        room = float(torch.as_tensor(self.spare).mean()) if self.has_spare else self.sigma_next**2
        return self.added / room if room > 0.0 else 0.0


@dataclass(frozen=True)
class Room:
    """How a step makes room: what its noise is multiplied with, and its length."""

    noise: float | torch.Tensor = 1.0
    length: float = 1.0

    @property
    def acts(self) -> bool:
        """Whether it changes the step at all."""
        return isinstance(self.noise, torch.Tensor) or self.noise != 1.0 or self.length != 1.0


def _full(move: Move, excess: float) -> Room:
    if not move.has_spare:
        return Room(length=stretch(move.sigma, move.target, move.sigma_next, move.added))
    noise = kept_std(move.spare, move.added)
    if isinstance(noise, float) and noise == 0.0:  # not enough noise to lower: a longer step makes up for the rest
        return Room(0.0, stretch(move.sigma, move.target, move.sigma_next, move.added))
    return Room(noise)


def _noise_only(move: Move, excess: float) -> Room:
    return Room(kept_std(move.spare, move.added)) if move.has_spare else Room()


def _drift(move: Move, excess: float) -> Room:
    length = move.sigma - move.target
    if move.has_spare or not math.isfinite(move.sigma) or length <= 0.0:
        return Room()
    return Room(length=1.0 + move.added / (2.0 * move.sigma * length))


def _step_back(move: Move, excess: float) -> Room:
    length = move.sigma - move.target
    if move.has_spare or not math.isfinite(move.sigma) or length <= 0.0:
        return Room()
    return Room(length=(math.sqrt(move.sigma**2 + max(excess, 0.0)) - move.target) / length)


# How a variant makes room for the noise. "full": lower the injected noise, else lengthen the step (this project);
# "noise": only the former (PTQD); "drift": Q-Drift's first-order form, 1 + |d sigma| q^2 / (2 sigma); "back": StepbaQ's
# idea, the next step starts from the level that the noise has taken the sample back to (`excess` of the step before).
ROOMS: dict[str, Callable[[Move, float], Room]] = {
    "full": _full,
    "noise": _noise_only,
    "drift": _drift,
    "back": _step_back,
}
