"""What a correction does, step by step: the table of the report."""

import copy
import math

from diffusers import DDIMScheduler, DDPMScheduler

from quantdm.correction import variance
from quantdm.correction.corrected import epsilon_std
from quantdm.correction.record import Correction


def step_table(
    correction: Correction, scheduler: DDIMScheduler | DDPMScheduler, steps: int, *, eta: float = 0.0
) -> list[dict[str, float]]:
    """Return per sampling step what the full correction does, for the report; the scheduler itself stays as it is.

    Keys: timestep, log_snr, k, bias (largest channel), q (epsilon units), occupancy (variance that the noise adds over
    what the step may have: the injected one, or that of the next noise level when nothing is injected), feasible (1 or
    0: whether the variance correction acts), and the diagnostics of the fit (r2, lag1, ...), interpolated.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    full, rows = correction.with_variant("both+variance"), []
    products = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps]
    last = 1.0 if isinstance(scheduler, DDPMScheduler) else float(scheduler.final_alpha_cumprod)
    for timestep, alpha_bar, alpha_bar_prev in zip(scheduler.timesteps, products, [*products[1:], last], strict=True):
        level = variance.log_snr(alpha_bar)
        at = full.at(level)
        q = epsilon_std(full, alpha_bar, at)
        if isinstance(scheduler, DDPMScheduler) or eta > 0:
            sigma = variance.ddim_sigma(alpha_bar, alpha_bar_prev, eta if isinstance(scheduler, DDIMScheduler) else 1.0)
            available = sigma**2
            if isinstance(scheduler, DDPMScheduler):
                absorbed = variance.ddpm_absorbed(alpha_bar, alpha_bar_prev, q)
            else:
                absorbed = variance.ddim_absorbed(alpha_bar, alpha_bar_prev, sigma, q)
            feasible = absorbed <= available
        else:
            here, after = variance.noise_level(alpha_bar), variance.noise_level(alpha_bar_prev)
            available = after**2
            # from pure noise the scheduler's own step is taken, see `variance.ddim_absorbed`
            absorbed = ((here - after) * q) ** 2 if math.isfinite(here) else 0.0
            feasible = variance.deterministic_target(here, after, q) < after
        rows.append(
            {
                "timestep": int(timestep),
                "log_snr": level,
                "k": at.k,
                "bias": float(abs(at.bias).max()),
                "q": q,
                "occupancy": absorbed / available if available > 0 else 0.0,
                "feasible": float(feasible),
                **correction.diagnostics_at(level),
            }
        )
    return rows
