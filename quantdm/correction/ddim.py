"""The eta of a DDIM step: the scheduler's default where a pipeline passes none, and never more noise than there is."""

from collections.abc import Mapping
from typing import Any

from quantdm.correction.moves import ddim_previous
from quantdm.errors import QuantDMError


def real_eta(scheduler: Any, arguments: Mapping[str, Any]) -> float:
    """Return eta, lowered by some roundings where 1 - alpha_bar' - sigma^2 rounds below zero.

    At zero terminal SNR with eta = 1 it is zero, and DDIM's square root of it is NaN on some processors. What is tried
    here is computed as DDIM does, on the same tensors: where that is real, eta stays.

    Raises:
        QuantDMError: no number of steps was set, or eta asks for more noise than the schedule has.
    """
    eta = arguments.get("eta")
    eta = scheduler.default_eta if eta is None else eta
    if not eta > 0 or not hasattr(scheduler, "_get_variance"):
        return eta
    timestep = int(arguments["timestep"])
    previous = ddim_previous(scheduler, timestep)
    after = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
    std = scheduler._get_variance(timestep, previous) ** 0.5
    lowered = eta
    while 1 - after - (lowered * std) ** 2 < 0:
        lowered *= 1 - 2**-23
        if lowered < eta * (1 - 2**-16):
            raise QuantDMError(f"scheduler: got eta {eta}, expected 0 to 1: there is less noise at timestep {timestep}")
    return lowered
