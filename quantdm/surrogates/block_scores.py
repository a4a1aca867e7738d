"""The graph surrogate's score of every assignment of every block, and its projection onto single layers.

The hop score of a configuration is a sum over roots (and, at hop 0, over layers), each of which depends on the layers
in its in-neighbourhood only. So the score of (block, assignment) is found by enumeration (docs/method.md,
Explanation).
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from quantdm.machine import single_thread
from quantdm.surrogates.graph_net import GraphNet
from quantdm.surrogates.plan import Plan, layers_below, make_plan
from quantdm.surrogates.space import SearchSpace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MAX_ASSIGNMENTS = 20_000
COMPLETIONS = 128  # per (layer, option), where a block has too many assignments
CHUNK = 4096


class HopSurrogate(Protocol):
    """A fitted ensemble of networks whose hop scores add up to the prediction: what is read of a `GraphSurrogate`."""

    space: SearchSpace
    plan: Plan
    networks_: list[GraphNet]
    prior_values_: Floats | None
    usage_: Floats | None

    def fitted(self) -> tuple[Floats, Floats]:
        """Return the statistics [K, 2, M] and the weights [M] of the hop scores."""
        ...

    def cells(self, choices: Ints, nodes: tuple[int, ...]) -> torch.Tensor:
        """Return the cell of every node in every configuration: [nodes, T]."""
        ...


@dataclass(frozen=True, eq=False)
class BlockScores:
    """Scores [K, N] of N assignments [N, layers] of one block, per fold; `layers` are positions on the layer axis."""

    name: str
    layers: tuple[int, ...]
    assignments: Ints
    scores: Floats


def score_blocks(surrogate: HopSurrogate) -> tuple[Floats, list[BlockScores]]:
    """Return the values of single layers at hop 0 (and of the prior) [K, L, O], and every block's scores, as y.

    Their sum over layers and blocks plus a constant is the prediction of each fold's network, exactly. Blocks with more
    than 20,000 assignments get a sample of them: for every layer and option the same random completions.
    """
    space = surrogate.space
    with torch.no_grad(), single_thread():
        encoded = [network.encode() for network in surrogate.networks_]
    zero = np.stack([_hop_zero(surrogate, fold, cells) for fold, cells in enumerate(encoded)])
    found = []
    for block in space.graph.blocks:
        if block.hops == 0:
            continue  # its root is a weight, read out at hop 0
        layers = tuple(space.layer_index[name] for name in layers_below(space.graph, block))
        assignments = _assignments(space, layers, seed=block.index)
        plan = make_plan(space.graph, [block], all_weights=False)
        scores = np.empty((len(surrogate.networks_), len(assignments)))
        for start in range(0, len(assignments), CHUNK):
            part = assignments[start : start + CHUNK]
            choices = np.zeros((len(part), len(space.layers)), dtype=np.int64)
            choices[:, layers] = part
            cells, edges = surrogate.cells(choices, plan.levels[0]), plan.batched_edges(len(part))
            with torch.no_grad(), single_thread():
                for fold, network in enumerate(surrogate.networks_):
                    norm = network(cells, plan, edges, encoded[fold])[block.hops][0].abs().sum(dim=1)
                    scores[fold, start : start + CHUNK] = norm.double().numpy() * _unit(surrogate, fold, block.hops)
        found.append(BlockScores(block.name, layers, assignments, scores))
    return zero, found


def layer_values(surrogate: HopSurrogate) -> Floats:
    """Project the scores of blocks onto single layers: [K, L, O].

    The value of an option is the mean score of the assignments that hold it, the other layers being distributed as in
    the training trials: there the surrogate knows what it says, and there the answer lies.
    """
    surrogate.fitted()
    assert surrogate.usage_ is not None
    values, blocks = score_blocks(surrogate)
    for block in blocks:
        usage = np.stack([surrogate.usage_[layer, block.assignments[:, i]] for i, layer in enumerate(block.layers)])
        for column, layer in enumerate(block.layers):
            weight = np.delete(usage, column, axis=0).prod(axis=0)
            for option in range(values.shape[2]):
                rows = np.flatnonzero(block.assignments[:, column] == option)
                values[:, layer, option] += block.scores[:, rows] @ weight[rows] / weight[rows].sum()
    return values


def _hop_zero(surrogate: HopSurrogate, fold: int, encoded: torch.Tensor) -> Floats:
    """Return what every cell adds to the prediction at hop 0: [L, O]."""
    shape = surrogate.space.bits.shape
    norm = encoded[: shape[0] * shape[1]].abs().sum(dim=1)
    found = norm.double().numpy().reshape(shape) * _unit(surrogate, fold, 0)
    if surrogate.prior_values_ is not None:
        stats, weights = surrogate.fitted()
        found += surrogate.prior_values_[fold] * (weights[-1] / stats[fold, 1, -1])
    return found


def _unit(surrogate: HopSurrogate, fold: int, hop: int) -> float:
    """Return w_m / (σ_m · number of roots): what one unit of a root's norm adds to the prediction."""
    stats, weights = surrogate.fitted()
    present = [m for m, roots in enumerate(surrogate.plan.roots) if roots]
    column = present.index(hop)
    return float(weights[column] / (stats[fold, 1, column] * len(surrogate.plan.roots[hop])))


def _assignments(space: SearchSpace, layers: tuple[int, ...], seed: int) -> Ints:
    """Return all assignments of the layers [N, layers], or a balanced sample when they are too many."""
    count = len(space.options)
    if count ** len(layers) <= MAX_ASSIGNMENTS:
        return np.stack(
            [axis.ravel() for axis in np.meshgrid(*[np.arange(count)] * len(layers), indexing="ij")], axis=1
        )
    completions = np.random.default_rng(seed).integers(0, count, size=(COMPLETIONS, len(layers)))
    found = []
    for column in range(len(layers)):
        for option in range(count):
            part = completions.copy()
            part[:, column] = option
            found.append(part)
    found.append(np.repeat(np.arange(count)[:, None], len(layers), axis=1))  # one scheme for all: cheapest, widest
    return np.concatenate(found)
