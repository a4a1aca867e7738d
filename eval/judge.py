"""A pipeline whose images are compared with its own of full precision, on equal noises."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from quantdm import get_denoiser, load_pipeline, load_protocol
from quantdm.machine import fast_dtype
from quantdm.metrics import frechet_distance, load_extractor
from quantdm.metrics.features import batched
from quantdm.metrics.samples import Draw, Samples, compare, compare_real, draw_samples
from quantdm.metrics.statistics import mean_and_sd


class Judge:
    """Measures whatever weights its denoiser holds.

    Args:
        name: an embedded pipeline.
        draws: the noises.
        rulers: further features by which the Frechet distance to full precision is taken, as `fd:NAME`.
    """

    def __init__(self, name: str, draws: Sequence[Draw], rulers: Sequence[str] = ()) -> None:
        self.protocol, self.draws = load_protocol(name), tuple(draws)
        self.extractor = load_extractor(self.protocol.features)
        self.rulers = {ruler: load_extractor(ruler) for ruler in rulers}
        self.pipe: DiffusionPipeline = load_pipeline(name, torch_dtype=getattr(torch, fast_dtype()))
        self.references = [(samples, self._others(samples)) for samples in map(self._samples, self.draws)]

    @property
    def denoiser(self) -> nn.Module:
        """Its denoiser, which the caller changes and puts back."""
        return get_denoiser(self.pipe)

    def figures(self) -> dict[str, Any]:
        """Return means and standard deviations over the draws."""
        found = []
        for draw, (reference, others) in zip(self.draws, self.references, strict=True):
            samples = self._samples(draw)
            own = self._others(samples)
            row = {**compare(samples, reference), **compare_real(samples, self.protocol)}
            found.append(row | {f"fd:{name}": frechet_distance(own[name], others[name]) for name in self.rulers})
        return mean_and_sd(found)

    def _samples(self, draw: Draw) -> Samples:
        return draw_samples(self.pipe, self.protocol, self.extractor, draw, may_be_constant=True)

    def _others(self, samples: Samples) -> dict[str, torch.Tensor]:
        return {name: batched(extractor, samples.images) for name, extractor in self.rulers.items()}
