"""What quantization noise of a known variance adds in one sampling step: closed forms on plain numbers.

Symbols: alpha_bar and alpha_bar_prev are the schedule's products at this step and at the next (less noisy) one, sigma
the injected noise, q the standard deviation of the noise that remains on the noise prediction, in epsilon units.
"""

import math

# The deterministic step is first order: it is taken only while the excess it compensates is small against sigma_next^2.
EXCESS_LIMIT = 0.25


def log_snr(alpha_bar: float) -> float:
    """Return log(alpha_bar / (1 - alpha_bar)), held finite where the schedule ends at pure noise or at pure signal."""
    alpha_bar = min(max(alpha_bar, 1e-12), 1.0 - 1e-12)
    return math.log(alpha_bar / (1.0 - alpha_bar))


def epsilon_units(prediction_type: str, alpha_bar: float) -> float:
    """Return the factor that turns a standard deviation of the network's output into one of epsilon."""
    if prediction_type == "v_prediction":
        return math.sqrt(alpha_bar)
    if prediction_type == "sample":
        return math.sqrt(alpha_bar / (1.0 - alpha_bar)) if alpha_bar < 1.0 else 0.0  # no noise: no epsilon either
    assert prediction_type == "epsilon", prediction_type
    return 1.0


def ddpm_absorbed(alpha_bar: float, alpha_bar_prev: float, q: float) -> float:
    """Return the variance that the noise adds in a DDPM step: beta_t^2 / (alpha_t (1 - alpha_bar_t)) q^2 (PTQD)."""
    if not 0.0 < alpha_bar < 1.0:  # zero terminal SNR: a step from pure noise has no epsilon to speak of
        return 0.0
    alpha = alpha_bar / alpha_bar_prev
    return (1.0 - alpha) ** 2 / (alpha * (1.0 - alpha_bar)) * q**2


def ddim_sigma(alpha_bar: float, alpha_bar_prev: float, eta: float) -> float:
    """Return DDIM's sigma_t(eta) (Song et al. 2021, equation 16)."""
    if alpha_bar >= 1.0 or alpha_bar_prev <= 0.0:
        return 0.0
    variance = (1.0 - alpha_bar_prev) / (1.0 - alpha_bar) * (1.0 - alpha_bar / alpha_bar_prev)
    return eta * math.sqrt(max(variance, 0.0))


def ddim_absorbed(alpha_bar: float, alpha_bar_prev: float, sigma: float, q: float) -> float:
    """Return the variance that the noise adds in a DDIM step, c_t^2 q^2, with the direction term at the original sigma.

    c_t = sqrt(1 - alpha_bar_prev - sigma^2) - sqrt(alpha_bar_prev (1 - alpha_bar) / alpha_bar): epsilon's factor.
    """
    if alpha_bar <= 0.0:  # zero terminal SNR, as above
        return 0.0
    direction = math.sqrt(max(1.0 - alpha_bar_prev - sigma**2, 0.0))
    c = direction - math.sqrt(alpha_bar_prev * (1.0 - alpha_bar) / alpha_bar)
    return c**2 * q**2


def kept_std(sigma: float, absorbed: float) -> float:
    """Return sigma' / sigma with sigma'^2 = max(sigma^2 - absorbed, 0): noise kept + absorbed = the schedule's."""
    return math.sqrt(max(1.0 - absorbed / sigma**2, 0.0)) if sigma > 0.0 else 1.0


def noise_level(alpha_bar: float) -> float:
    """Return sigma = sqrt((1 - alpha_bar) / alpha_bar), the noise level of x / sqrt(alpha_bar)."""
    return math.sqrt((1.0 - alpha_bar) / alpha_bar) if alpha_bar > 0.0 else math.inf


def deterministic_target(sigma: float, sigma_next: float, q: float) -> float:
    """Return the level sigma' to step to, so that sigma'^2 + (sigma' - sigma)^2 q^2 = sigma_next^2.

    Where that is infeasible (sigma_next^2 < q^2 sigma^2 / (1 + q^2)), or no small change of the step, sigma_next
    itself: the scheduler's own step. The formula's minimum-variance step instead would wreck the samples.
    """
    if not math.isfinite(sigma) or ((sigma - sigma_next) * q) ** 2 > EXCESS_LIMIT * sigma_next**2:
        return sigma_next
    disc = sigma**2 * q**4 - (1.0 + q**2) * (q**2 * sigma**2 - sigma_next**2)
    if disc < 0.0:
        return sigma_next
    return (sigma * q**2 + math.sqrt(disc)) / (1.0 + q**2)


def deterministic_stretch(alpha_bar: float, alpha_bar_prev: float, q: float) -> float:
    """Return how much longer the step to `deterministic_target` is than the scheduler's own; 1 where it takes that."""
    sigma, sigma_next = noise_level(alpha_bar), noise_level(alpha_bar_prev)
    if sigma == sigma_next:  # set_alpha_to_one=False: the last step goes nowhere
        return 1.0
    target = deterministic_target(sigma, sigma_next, q)
    return 1.0 if target == sigma_next else (target - sigma) / (sigma_next - sigma)
