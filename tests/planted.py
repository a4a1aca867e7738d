"""A search space on the traced graph of a denoiser (by default one of digits-dit's size), and planted labels."""

from functools import cache

import diffusers
import numpy as np
import torch

from quantdm.allocation import select
from quantdm.allocation.sampling import sample_configs, sample_frontier
from quantdm.denoisers.analysis import trace_graph
from quantdm.denoisers.inventory import list_layers
from quantdm.schemes import PAPER_OPTIONS
from quantdm.surrogates import BlockScores, SearchSpace
from tests.architectures import DIGITS, PUBLIC

FLOOR, LABEL_NOISE = 0.02, 0.06  # of fid_fp, and of its logarithm: docs/method.md, What was measured
METHOD_EFFECT = {("uniform", "channel"): 1.0, ("kmeans", "channel"): 0.5, ("kmeans", "tensor"): 1.6}


@cache
def planted_space(options=PAPER_OPTIONS, model: str = "digits-dit") -> SearchSpace:
    """Bits as they are counted; errors fall fourfold per bit, differ by method, and scatter over layers."""
    kind, config = {**DIGITS, **PUBLIC}[model]
    with torch.device("meta"):
        denoiser = getattr(diffusers, kind)(**config)
    layers, rng = list_layers(denoiser), np.random.default_rng(0)
    bits = np.array([[_bits(layer, option) for option in options] for layer in layers])
    shape = np.array([METHOD_EFFECT[o.method, o.granularity] * 4.0**-o.bits for o in options])
    sensitivity = np.exp(rng.normal(size=(len(layers), 1)))
    weight_error = shape * np.exp(0.1 * rng.normal(size=bits.shape))
    noise_error = 0.5 * shape * sensitivity * np.exp(0.2 * rng.normal(size=bits.shape))
    return SearchSpace(layers, trace_graph(denoiser), tuple(options), bits, weight_error, noise_error)


def _bits(layer, option) -> int:
    channels = layer.shape[0]
    tables = {"uniform": 2 * channels, "kmeans": 2**option.bits * (channels if option.granularity == "channel" else 1)}
    return layer.num_weights * option.bits + 16 * tables[option.method]


class PlantedTruth:
    """fid_fp = FLOOR + 0.1 · (S + interaction): every operation type and method errs by its own factor.

    The interaction adds, inside every block, the cross terms of errors that partly point the same way.
    """

    def __init__(self, space: SearchSpace, *, seed: int = 0, interaction: float = 0.2) -> None:
        rng = np.random.default_rng(seed)
        types = sorted({layer.op_type for layer in space.layers})
        self.type_effect = dict(zip(types, np.exp(0.7 * rng.normal(size=len(types))), strict=True))
        methods = sorted({(o.method, o.granularity) for o in space.options})
        factor = dict(zip(methods, np.exp(0.4 * rng.normal(size=len(methods))), strict=True))
        by_type = np.array([[self.type_effect[layer.op_type]] for layer in space.layers])
        by_method = np.array([factor[o.method, o.granularity] for o in space.options])
        self.terms = space.noise_error * by_type * by_method
        self.terms /= self.terms[:, [o.label for o in space.options].index("kmeans-channel-3")].sum()
        self.space, self.interaction = space, interaction
        self.blocks = [[space.layer_index[name] for name in block.layers] for block in space.graph.blocks]

    def y(self, choices) -> np.ndarray:
        """Noiseless labels -log(fid_fp): [T, L] -> [T]."""
        terms = self.space.gather(self.terms, choices)
        total = terms.sum(axis=1)
        for members in self.blocks:
            part = terms[:, members]
            total = total + self.interaction * (np.sqrt(part).sum(axis=1) ** 2 - part.sum(axis=1)) / len(members)
        return -np.log(FLOOR + 0.1 * total)

    def optimum(self, target_bits: float) -> float:
        """Return the largest noiseless label at a size, exactly: errors and interactions are additive over blocks."""
        found = []
        for block, members in zip(self.space.graph.blocks, self.blocks, strict=True):
            rows = np.array(list(np.ndindex(*[len(self.space.options)] * len(members))))
            part = self.terms[members, rows]
            cross = (np.sqrt(part).sum(axis=1) ** 2 - part.sum(axis=1)) / len(members)
            scores = -(part.sum(axis=1) + self.interaction * cross)
            found.append(BlockScores(block.name, tuple(members), rows, scores[None]))
        none = np.zeros(self.space.bits.shape)
        return float(self.y(select(self.space, none, blocks=found, target_bits=target_bits))[0])

    def trials(self, count: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Half random, half near the frontier at 3 bits, with label noise: choices [T, L] and y [T]."""
        choices = np.concatenate(
            [
                sample_configs(self.space, count - count // 2, seed=seed),
                sample_frontier(self.space, -self.space.noise_error, count // 2, target_bits=3.0, seed=seed),
            ]
        )
        return choices, self.y(choices) + LABEL_NOISE * np.random.default_rng(seed).normal(size=count)
