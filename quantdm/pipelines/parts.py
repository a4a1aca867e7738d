"""Which parts of a pipeline are its denoiser."""

from diffusers import DiffusionPipeline
from torch import nn

from quantdm.errors import QuantDMError

DENOISER_NAMES = ("unet", "transformer", "prior")  # where a pipeline has its denoiser, in this order


def get_denoiser(pipe: DiffusionPipeline | nn.Module) -> nn.Module:
    """Return the U-Net or transformer of a pipeline (a module is returned as it is).

    Raises:
        QuantDMError: the pipeline has neither.
    """
    if isinstance(pipe, nn.Module):
        return pipe
    for name in DENOISER_NAMES:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return module
    parts = ", ".join(pipe.components)
    raise QuantDMError(f"{type(pipe).__name__} has no denoiser (`unet` or `transformer`); its components are {parts}")
