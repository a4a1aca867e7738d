"""What a pipeline is, as hashes."""

from torch import nn

from quantdm.files import digest


def fingerprint(denoiser: nn.Module) -> str:
    """Return the hash of a denoiser's class, parameter names and weights (independent of the loading dtype's width)."""
    tensors = [(name, p.detach().float()) for name, p in denoiser.named_parameters()]
    return digest(type(denoiser).__name__, *[part for pair in tensors for part in pair])
