"""What corrected schedulers share: the correction, read from the config, and the corrected mean.

A corrected scheduler keeps the plain config and adds one private entry, `_quantdm`. diffusers carries private entries
through `save_pretrained`, `from_pretrained` and `from_config` of every scheduler class, so a corrected pipeline saves
and loads as it is (after `import quantdm`), and the same scheduler_config.json opens as the plain scheduler without us.
"""

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from quantdm.correction import variance
from quantdm.correction.record import Correction, StepCorrection
from quantdm.errors import QuantDMError

KEY = "_quantdm"


class CorrectedScheduler(SchedulerMixin, ConfigMixin):
    """What the corrected schedulers share: the correction and the default eta, read from the config."""

    alphas_cumprod: torch.Tensor

    @property
    def correction(self) -> Correction | None:
        """The correction that is applied."""
        record = self.config.get(KEY, {}).get("correction")
        if record is None:
            return None
        parsed = self.__dict__.get("_parsed")
        if parsed is None or parsed[0] is not record:
            parsed = self.__dict__["_parsed"] = (record, Correction.from_dict(record))
        return parsed[1]

    @property
    def default_eta(self) -> float:
        """The eta of a step that is given none (DiTPipeline gives none)."""
        return self.config.get(KEY, {}).get("eta", 0.0)

    def correct_mean(self, model_output: torch.Tensor, timestep: int, channels: int) -> torch.Tensor:
        """Return (model_output - bias) / (1 + k) on the first `channels` channels (the rest predict a variance).

        This is the unbiased inverse, not the posterior mean: shrinking would over-disperse the samples.
        """
        correction = self.correction
        if correction is None or correction.variant == "none":
            return model_output
        if correction.channels != channels:
            raise QuantDMError(
                f"correction of model {correction.model!r} is for {correction.channels} channels, the sample has "
                f"{channels}: it belongs to another model; fit one with `fit_correction`"
            )
        at = correction.at(variance.log_snr(float(self.alphas_cumprod[timestep])))
        head, rest = model_output[:, :channels], model_output[:, channels:]
        wide = head.to(torch.promote_types(head.dtype, torch.float32))
        bias = torch.as_tensor(at.bias, dtype=wide.dtype, device=wide.device).view(1, -1, *[1] * (head.ndim - 2))
        return torch.cat([((wide - bias) / (1.0 + at.k)).to(head.dtype), rest], dim=1)

    def remaining_std(self, timestep: int) -> float:
        """Return q, the std in epsilon units of the noise that the mean correction leaves; 0 if it is not used."""
        correction = self.correction
        if correction is None or not correction.uses_variance:
            return 0.0
        alpha_bar = float(self.alphas_cumprod[timestep])
        return epsilon_std(correction, alpha_bar, correction.at(variance.log_snr(alpha_bar)))


def epsilon_std(correction: Correction, alpha_bar: float, at: StepCorrection) -> float:
    return at.q / (1.0 + at.k) * variance.epsilon_units(correction.prediction_type, alpha_bar)
