"""What a correction does, step by step: the table of the report."""

import inspect
from typing import Any

import torch

from quantdm.correction.corrected import KEY, corrected_class
from quantdm.correction.levels import check_served, plain_name
from quantdm.correction.record import Correction
from quantdm.correction.schedulers import plain_class, plain_config


def step_arguments(scheduler: Any, output: Any, timestep: Any, sample: Any) -> dict[str, Any]:
    """Return the arguments of a scheduler's step: those that it cannot do without, and no tensors of a pipeline."""
    mask = torch.zeros_like(sample)  # nothing is known of the picture
    others = {"old_pred_original_sample": None, "timestep_back": None, "original_image": sample, "mask": mask}
    taken = inspect.signature(scheduler.step).parameters
    clock = timestep.reshape(1) if hasattr(scheduler, "_alpha_cumprod") else timestep
    found = {"model_output": output, "timestep": clock, "sample": sample}
    return found | {name: value for name, value in others.items() if name in taken}


def steps_of(scheduler: Any) -> Any:
    """Return the timesteps at which a network is asked: two schedulers also keep that of the image."""
    last = plain_name(scheduler) in ("DDPMWuerstchenScheduler", "SCMScheduler")
    return scheduler.timesteps[:-1] if last else scheduler.timesteps


def step_table(correction: Correction, scheduler: Any, steps: int, *, eta: float = 0.0) -> list[dict[str, float]]:
    """Return per sampling step what the full correction does, for the report; the scheduler itself stays as it is.

    Keys: timestep, log_snr, k, bias (largest channel), q (in units of e), occupancy (variance that the noise adds over
    what the step may have: the injected one, or that of the next noise level when nothing is injected), feasible (1 or
    0: whether the variance correction acts), and the diagnostics of the fit (r2, lag1, ...), interpolated.

    Raises:
        QuantDMError: the scheduler is not served.
    """
    check_served(scheduler)
    full = correction.with_variant("both+variance")
    record = {"correction": {**full.to_dict(), "within": None}, "eta": eta}
    made: Any = corrected_class(plain_class(scheduler))
    ours = made.from_config({**plain_config(scheduler), KEY: record})
    shift = {"mu": ours.config.max_shift} if ours.config.get("use_dynamic_shifting") else {}  # of large images
    ours.set_timesteps(steps, **shift)
    rows = []
    sample = torch.zeros(1, full.channels, 1, 1).movedim(1, full.axis)
    learned = ours.config.get("variance_type") in ("learned", "learned_range")
    output = torch.cat([sample, sample], dim=1) if learned else sample
    for timestep in steps_of(ours):  # what a step does depends on no sample
        if hasattr(ours, "scale_model_input"):
            ours.scale_model_input(sample, timestep)
        ours.step(**step_arguments(ours, output, timestep, sample))
        did = ours.did
        assert did is not None
        rows.append(
            {
                "timestep": float(timestep),
                "log_snr": did.level.log_snr,
                "k": float(1.0 / did.at.gain[0] - 1.0),
                "bias": float(abs(did.at.bias).max()),
                "q": did.q,
                "occupancy": 0.0 if did.move is None else did.move.occupancy,
                "feasible": float(did.room is not None and did.room.acts),
                **full.diagnostics_at(did.level.log_snr),
            }
        )
    return rows
