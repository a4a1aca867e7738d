"""A search space on the traced graph of a denoiser (by default one of digits-dit's size), and planted labels."""

from functools import cache
from typing import Literal

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


Interaction = Literal["none", "coherent", "worst", "amplified"]


class MeetingTruth:
    """fid_fp = FLOOR + 0.1 · sum over blocks of how their layers' errors t meet.

    "none": sum t. "coherent": (sum sqrt t)². "worst": n · max t. "amplified": sum t_i · (1 + 2 min(1, t after i /
    usual)): layers pass earlier errors on, the more the worse they are. Types, methods and layers err by own factors.
    """

    def __init__(self, space: SearchSpace, kind: Interaction, *, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        types = sorted({layer.op_type for layer in space.layers})
        by_type = dict(zip(types, np.exp(0.7 * rng.normal(size=len(types))), strict=True))
        methods = [o.label.replace(f"-{o.bits}", "") for o in space.options]
        by_method = {method: np.exp(0.4 * rng.normal()) for method in sorted(set(methods))}
        factor = np.array([[by_type[la.op_type]] for la in space.layers]) * np.array([by_method[m] for m in methods])
        self.terms = space.noise_error * factor * np.exp(0.3 * rng.normal(size=(len(space.layers), 1)))
        middle = np.argsort(space.bits.sum(axis=0))[len(space.options) // 2]
        self.terms /= self.terms[:, middle].sum()
        self.space, self.kind = space, kind
        self.blocks = [[space.layer_index[name] for name in block.layers] for block in space.graph.blocks]

    def block_cost(self, members: list[int], part: np.ndarray) -> np.ndarray:
        """What one block costs: its terms [N, n] -> [N]."""
        if self.kind == "coherent":
            return np.sqrt(part).sum(axis=1) ** 2
        if self.kind == "worst":
            return len(members) * part.max(axis=1)
        found = part.sum(axis=1)
        for i in range(len(members) - 1 if self.kind == "amplified" else 0):
            usual = self.terms[members[i + 1 :]].mean() * (len(members) - i - 1)
            found = found + 2 * part[:, i] * np.minimum(1, part[:, i + 1 :].sum(axis=1) / usual)
        return found

    def y(self, choices) -> np.ndarray:
        """Noiseless labels -log(fid_fp): [T, L] -> [T]."""
        terms = self.space.gather(self.terms, choices)
        return -np.log(FLOOR + 0.1 * sum(self.block_cost(members, terms[:, members]) for members in self.blocks))

    def optimum(self, target_bits: float) -> float:
        """Return the largest noiseless label at a size, exactly: costs are additive over blocks."""
        found = []
        for block, members in zip(self.space.graph.blocks, self.blocks, strict=True):
            rows = np.array(list(np.ndindex(*[len(self.space.options)] * len(members))))
            cost = self.block_cost(members, self.terms[members, rows])
            found.append(BlockScores(block.name, tuple(members), rows, -cost[None]))
        none = np.zeros(self.space.bits.shape)
        return float(self.y(select(self.space, none, blocks=found, target_bits=target_bits))[0])

    def trials(self, count: int, *, seed: int = 0, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
        """Random configurations of every size, with label noise: choices [T, L] and y [T]."""
        choices = sample_configs(self.space, count, seed=seed)
        return choices, self.y(choices) + noise * np.random.default_rng(seed).normal(size=count)

    def near(self, count: int, *, target_bits: float = 3.0) -> np.ndarray:
        """Configurations near the frontier at a size, of no trial: choices [T, L]."""
        return sample_frontier(self.space, -self.space.noise_error, count, target_bits=target_bits, seed=77)
