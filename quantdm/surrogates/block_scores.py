"""The graph surrogate's score of every assignment of every block, and its projection onto single layers.

The cost of a configuration is a sum over roots, each of which depends on the layers of its block only. So the score of
(block, assignment) is found by enumeration; docs/method.md, Explanation.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quantdm.surrogates.additive_model import log_terms
from quantdm.surrogates.amplitudes import AmplitudeNet
from quantdm.surrogates.space import SearchSpace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MAX_ASSIGNMENTS = 20_000
COMPLETIONS = 128  # per (layer, option), where a block has too many assignments


class RootSurrogate(Protocol):
    """Fitted networks whose cost is a sum over roots: what is read of a `GraphSurrogate`."""

    space: SearchSpace
    net: AmplitudeNet

    @property
    def thetas(self) -> Floats:
        """The parameters of the final fit and of every fold's [1+K, P]."""
        ...

    @property
    def background(self) -> Ints:
        """Trials around which values of single layers are looked at [N, L]."""
        ...

    def units(self) -> Floats:
        """Return what one unit of cost changes y by at the median trial [1+K]."""
        ...


@dataclass(frozen=True, eq=False)
class BlockScores:
    """Scores [K, N] of N assignments [N, layers] of one block, per fold; `layers` are positions on the layer axis."""

    name: str
    layers: tuple[int, ...]
    assignments: Ints
    scores: Floats

    def bounded(self, kappa: float) -> "BlockScores":
        """Return the first scores (of the final fit) less kappa standard deviations over all, as one row.

        The best of thousands of assignments is often the one whose score errs most upwards; what folds disagree on is
        bounded by what they agree on. Only what differs inside a block counts: a shift of all its scores changes no
        choice, so scores are compared with the block's mean in every fold.
        """
        relative = self.scores - self.scores.mean(axis=1, keepdims=True)
        bound = self.scores[0] - kappa * relative.std(axis=0)
        return BlockScores(self.name, self.layers, self.assignments, bound[None])


def score_blocks(surrogate: RootSurrogate) -> tuple[Floats, list[BlockScores]]:
    """Return the values of single layers without a block [1+K, L, O], and every block's scores, in units of y.

    Scores are costs times `units`, so the sum over layers and blocks orders configurations exactly as the prediction of
    the same network does. Blocks with more than 20,000 assignments get those of options that no other option of the
    layer beats in bits and in cost, and a sample of these if they are still too many: for every layer and option the
    same random completions.
    """
    space, net, units = surrogate.space, surrogate.net, surrogate.units()
    tables = [log_terms(net.design, theta) for theta in surrogate.thetas]
    messages = [net.messages(theta) for theta in surrogate.thetas]
    zero = np.zeros((len(tables), *space.bits.shape))
    alone = net.wiring.alone
    for fold, table in enumerate(tables):
        zero[fold, alone] = units[fold] * np.exp(table[alone])
    found = []
    for index, layers in enumerate(net.wiring.blocks):
        rows = _assignments(space, layers, tables[0], seed=index)
        scores = [
            unit * net.root_energy(index, table[layers, rows], said)
            for unit, table, said in zip(units, tables, messages, strict=True)
        ]
        found.append(BlockScores(net.wiring.names[index], layers, rows, np.stack(scores)))
    return zero, found


def layer_values(surrogate: RootSurrogate) -> Floats:
    """Project the scores of blocks onto single layers: [1+K, L, O].

    The value of an option is the mean score of its block when the layer takes it and the others stay as in the better
    half of the trials: there the surrogate knows what it says, and there the answer lies.
    """
    space, net, units = surrogate.space, surrogate.net, surrogate.units()
    options, background = np.arange(len(space.options)), surrogate.background
    values = np.zeros((len(units), *space.bits.shape))
    for fold, (unit, theta) in enumerate(zip(units, surrogate.thetas, strict=True)):
        table, messages = log_terms(net.design, theta), net.messages(theta)
        values[fold, net.wiring.alone] = unit * np.exp(table[net.wiring.alone])
        for index, layers in enumerate(net.wiring.blocks):
            usual = table[layers, background[:, layers]]  # [N, layers]
            for column, layer in enumerate(layers):
                varied = np.repeat(usual[:, None], len(options), axis=1)
                varied[:, :, column] = table[layer]
                energy = net.root_energy(index, varied.reshape(-1, len(layers)), messages)
                values[fold, layer] = unit * energy.reshape(len(usual), -1).mean(axis=0)
    return values


def _assignments(space: SearchSpace, layers: tuple[int, ...], log_term: Floats, seed: int) -> Ints:
    """Return all assignments of the layers [N, layers], or those worth a look when they are too many."""
    axes = [np.arange(len(space.options))] * len(layers)
    if len(space.options) ** len(layers) > MAX_ASSIGNMENTS:
        axes = [_worth(space.bits[layer], log_term[layer]) for layer in layers]
    if np.prod([len(axis) for axis in axes], dtype=float) <= MAX_ASSIGNMENTS:
        return np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
    rng, found = np.random.default_rng(seed), []
    completions = np.stack([rng.choice(axis, size=COMPLETIONS) for axis in axes], axis=1)
    for column, axis in enumerate(axes):
        for option in axis:
            part = completions.copy()
            part[:, column] = option
            found.append(part)
    found += [np.array([[axis[0] for axis in axes]]), np.array([[axis[-1] for axis in axes]])]  # cheapest, widest
    return np.concatenate(found)


def _worth(bits: Ints, log_term: Floats) -> Ints:
    """Return the options that no other one beats in bits and in cost, fewest bits first."""
    kept: list[int] = []
    for option in np.lexsort((log_term, bits)):
        if not kept or log_term[option] < log_term[kept[-1]]:
            kept.append(int(option))
    return np.array(kept)
