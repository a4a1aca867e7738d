"""How one network of the graph surrogate is trained: AdamW on squared and ranking losses, stopped by watched trials."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quantdm.machine import single_thread
from quantdm.surrogates.graph_net import GraphNet, hop_scores
from quantdm.surrogates.losses import RankLoss, rank_loss, relevance
from quantdm.surrogates.plan import Plan

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-6
CHECK_EVERY = 5  # epochs between two looks at the validation loss


@dataclass(frozen=True)
class Schooling:
    """The settings of a training (see `GraphSurrogate`)."""

    epochs: int
    batch_size: int
    patience: int
    ranking: RankLoss


def train_network(
    network: GraphNet,
    plan: Plan,
    cells: Tensor,
    labels: Floats,
    weights: Floats,
    *,
    settings: Schooling,
    seed: int,
    on_epoch: Callable[[int], object],
) -> Ints:
    """Train a network in place on trials; return the sixth of them that it did not learn from but was watched on.

    The watched trials decide when to stop and which state is kept.

    Args:
        network: fresh, of the right number of hops.
        plan: what to compute.
        cells: the cell of every node of plan.levels[0] in every trial [nodes, T].
        labels: y [T].
        weights: of the trials [T].
        settings: how long, how many at once, which ranking loss.
        seed: of the split and of the order.
        on_epoch: called with the number of epochs done.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    held = max(4, len(labels) // 6)
    watched, learned = order[:held], order[held:]
    loss = _Loss(network, plan, cells, labels, weights, settings.ranking)
    nn.init.constant_(network.regressor[-1].bias, float(loss.r.mean()) / loss.scale)  # type: ignore[arg-type]
    steps = -(-len(learned) // settings.batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * steps)
    best = _Best(network)
    with single_thread():
        for epoch in range(settings.epochs):
            network.train()
            shuffled = learned[torch.randperm(len(learned), generator=generator)]
            for rows in torch.tensor_split(shuffled, steps):
                optimizer.zero_grad()
                loss(rows).backward()
                optimizer.step()
                schedule.step()
            on_epoch(epoch + 1)
            if (epoch + 1) % CHECK_EVERY == 0 or epoch + 1 == settings.epochs:
                network.eval()
                with torch.no_grad():
                    since = best.look(epoch, float(loss(watched)))
                if since >= max(1, settings.patience):
                    break
    best.restore()
    network.eval()
    return watched.numpy()


class _Loss:
    """The squared error of the regressor and the mean ranking loss of the hops, over some of the trials."""

    def __init__(
        self, network: GraphNet, plan: Plan, cells: Tensor, labels: Floats, weights: Floats, ranking: RankLoss
    ) -> None:
        self.network, self.plan, self.cells = network, plan, cells
        self.ranking = rank_loss(ranking)
        self.r = torch.from_numpy(relevance(labels, labels)).float()
        self.scale = float(self.r.std(correction=0))
        self.w = torch.from_numpy(weights).float()

    def __call__(self, rows: Tensor) -> Tensor:
        roots = self.network(self.cells[:, rows], self.plan, self.plan.batched_edges(len(rows)))
        r = self.r[rows]
        # both in units of the spread of r, so that no term of the loss drowns the others
        predicted = self.scale * self.network.regressor(roots[-1].mean(dim=0))[:, 0]
        squared = (self.w[rows] * ((predicted - r) / self.scale).square()).mean()
        ranked = torch.stack([self.ranking(r, score) for score in hop_scores(roots).T])
        return squared + ranked.mean()


class _Best:
    """The state of the least validation loss so far."""

    def __init__(self, network: GraphNet) -> None:
        self.network = network
        self.loss, self.epoch = np.inf, 0
        self.state: dict[str, Tensor] | None = None

    def look(self, epoch: int, loss: float) -> int:
        """Keep the present state if it is the best; return the epochs since the best."""
        if loss < self.loss:
            self.loss, self.epoch = loss, epoch
            self.state = {name: value.clone() for name, value in self.network.state_dict().items()}
        return epoch - self.epoch

    def restore(self) -> None:
        """Return to the best state; the last one stays where no loss was a number."""
        if self.state is not None:
            self.network.load_state_dict(self.state)
