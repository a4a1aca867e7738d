"""The graph surrogate: a five-fold ensemble of GraphNets whose hop scores rank configurations and split over blocks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from quantdm.errors import QuantDMError
from quantdm.files import load_tensors, save_tensors
from quantdm.machine import single_thread
from quantdm.surrogates.additive import AdditiveSurrogate
from quantdm.surrogates.block_scores import layer_values
from quantdm.surrogates.graph_net import CellTable, GraphNet, hop_scores
from quantdm.surrogates.graph_training import Schooling, train_network
from quantdm.surrogates.hop_weights import moments, prior_without, weigh_hops
from quantdm.surrogates.losses import RankLoss
from quantdm.surrogates.plan import make_plan
from quantdm.surrogates.ranking import judge_folds, spearman
from quantdm.surrogates.space import SearchSpace
from quantdm.surrogates.trials import check_trials, split_folds

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Progress = Callable[[int, int], object]
GRAPH_VERSION = 3
FOLDS, MIN_TRIALS = 5, 20
WHY = "five folds rank at least four held-out trials each, and a fifth of the rest decides when to stop"


class GraphSurrogate:
    """Rank configurations with GATv2 layers on the traced graph (docs/method.md, Surrogates).

    The prediction is intercept + mean over folds of sum_m w_m · (‖h_G^m‖₁ - μ_m) / σ_m: hop scores, exactly additive
    over the roots of blocks, so what predicts is what is explained. w_m >= 0 weighs the hops by how they explain
    held-out trials together (non-negative least squares). The regressor shapes the embeddings only. With `prior` the
    terms of the additive surrogate, fitted to the same training trials, are one more score of the sum: it knows that
    errors multiply, which a few hundred trials do not teach a network; the networks add what happens inside blocks.

    The held-out scores are nested. The w_m of the prediction are found with the held-out trials of all networks, which
    would not do for judging fold k: the other networks were trained on it. There the w_m come from the trials that
    decided when to stop the training of network k, and from a prior that was fitted without them. They are few (a
    sixth), so the score is rather too low than too high; nested training would cost five times as much.

    Args:
        space: layers, options, graph and cheap errors.
        epochs: upper limit; training stops after `patience` epochs without a better validation loss.
        ranking: "srcc", "ndcg" or "hybrid".
        prior: whether the additive surrogate's score joins those of the hops.
        progress: called as progress(done, total) in units of epochs.
    """

    name = "graph"

    def __init__(
        self,
        space: SearchSpace,
        *,
        random_state: int = 0,
        epochs: int = 200,
        batch_size: int = 128,
        patience: int = 50,
        ranking: RankLoss = "srcc",
        prior: bool = True,
        progress: Progress | None = None,
    ) -> None:
        self.space = space
        self.random_state = random_state
        self.epochs, self.batch_size, self.patience = epochs, batch_size, patience
        self.ranking: RankLoss = ranking
        self.prior = prior
        self.progress = progress
        self.plan = make_plan(space.graph, space.graph.blocks, all_weights=True)
        self.held_out_: Floats | None = None  # [T] prediction of every trial by its fold, which has not seen it
        self.cv_scores_: list[float] = []  # Spearman of every fold's held-out predictions
        self.cv_ndcg_: list[float] = []  # their NDCG@10
        self.cv_hop_scores_: Floats | None = None  # [K, M] held-out Spearman of every hop alone
        self.networks_: list[GraphNet] = []
        self.prior_values_: Floats | None = None  # [K, L, O] the additive surrogate's terms in units of y
        # M counts the hops that have roots, and the prior behind them
        self.hop_stats_: Floats | None = None  # [K, 2, M] mean and standard deviation of the scores on training trials
        self.hop_weights_: Floats | None = None  # [M] w_m >= 0
        self.intercept_: float = 0.0
        self.usage_: Floats | None = None  # [L, O] how often the training trials used every option

    def fit(self, choices: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> "GraphSurrogate":
        """Fit five networks, each without one fold, and weigh the hops by the held-out trials.

        Raises:
            QuantDMError: fewer than 20 trials, or trials that do not fit the space.
        """
        choices, labels, weights = check_trials(self.space, choices, y, sample_weight, minimum=MIN_TRIALS, why=WHY)
        folds = split_folds(len(labels), FOLDS, self.random_state)
        self.networks_, self.prior_values_, stats, z, additive = [], None, [], None, None
        if self.prior:  # it splits the trials into the same folds
            additive = AdditiveSurrogate(self.space, random_state=self.random_state).fit(choices, labels, weights)
            self.prior_values_ = additive.fold_values()[1:]
        self.held_out_ = np.empty(len(labels))
        for index, fold in enumerate(folds):
            train = np.setdiff1d(np.arange(len(labels)), fold)
            part = choices[train], labels[train], weights[train]
            network, watched = self._train(index, *part)
            scores = self._scores(index, network, choices)
            mean, spread = moments(scores[train])
            scores = (scores - mean) / spread
            z = np.empty_like(scores) if z is None else z
            z[fold], own = scores[fold], scores[train]
            if additive is not None:
                own[:, -1] = prior_without(additive, index, *part, watched)
            hop_weights, intercept = weigh_hops(own[watched], part[1][watched], part[2][watched], prior=self.prior)
            self.held_out_[fold] = intercept + scores[fold] @ hop_weights
            self.networks_.append(network)
            stats.append(np.stack([mean, spread]))
        assert z is not None
        self.hop_stats_ = np.stack(stats)
        self.hop_weights_, self.intercept_ = weigh_hops(z, labels, weights, prior=self.prior)
        counts = (choices[:, :, None] == np.arange(len(self.space.options))).sum(axis=0)
        self.usage_ = (counts + 1) / (len(choices) + len(self.space.options))
        self.cv_scores_, self.cv_ndcg_ = judge_folds(self.held_out_, labels, folds)
        self.cv_hop_scores_ = np.array([[spearman(score, labels[fold]) for score in z[fold].T] for fold in folds])
        return self

    def predict(self, choices: ArrayLike) -> Floats:
        """Predict y: [T, L] -> [T]."""
        choices = self.space.check(choices)
        stats, weights = self.fitted()
        predictions = [
            ((self._scores(index, network, choices) - mean) / spread) @ weights
            for index, (network, (mean, spread)) in enumerate(zip(self.networks_, stats, strict=True))
        ]
        return self.intercept_ + np.mean(predictions, axis=0)

    def score(self, choices: ArrayLike, y: ArrayLike) -> float:
        """Return Spearman's rank correlation of the prediction with y."""
        return spearman(self.predict(choices), np.asarray(y, dtype=np.float64))

    def fitted(self) -> tuple[Floats, Floats]:
        """Return the statistics [K, 2, M] and the weights [M] of the hop scores.

        Raises:
            QuantDMError: not fitted.
        """
        if self.hop_stats_ is None or self.hop_weights_ is None:
            raise QuantDMError("GraphSurrogate is not fitted; call fit(choices, y) first")
        return self.hop_stats_, self.hop_weights_

    def fold_values(self) -> Floats:
        """Return the layer values of every fold: [K, L, O] (see `quantdm.surrogates.block_scores`)."""
        return layer_values(self)

    def cells(self, choices: Ints, nodes: tuple[int, ...]) -> Tensor:
        """Return the cell of every node in every configuration: [nodes, T] (see `CellTable`)."""
        options, rows, combine = len(self.space.options), [], 0
        combine_cell = {}
        for node in self.space.graph.nodes:
            if node.layer is None:
                combine_cell[node.id] = self.space.bits.size + combine
                combine += 1
        for node in nodes:
            layer = self.space.graph.nodes[node].layer
            if layer is None:
                rows.append(np.full(len(choices), combine_cell[node]))
            else:
                index = self.space.layer_index[layer]
                rows.append(index * options + choices[:, index])
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def save(self, path: str | Path) -> None:
        """Write the fitted surrogate as safetensors with its settings as JSON in the header."""
        stats, weights = self.fitted()
        assert self.cv_hop_scores_ is not None
        assert self.held_out_ is not None
        assert self.usage_ is not None
        tensors = {
            f"{fold}.{name}": tensor
            for fold, network in enumerate(self.networks_)
            for name, tensor in network.state_dict().items()
        }
        metadata = {
            "version": GRAPH_VERSION,
            "space": self.space.digest,
            "settings": {
                "random_state": self.random_state,
                "epochs": self.epochs,
                "batch_size": self.batch_size,
                "patience": self.patience,
                "ranking": self.ranking,
                "prior": self.prior,
            },
            "prior_values": None if self.prior_values_ is None else self.prior_values_.tolist(),
            "hop_stats": stats.tolist(),
            "hop_weights": weights.tolist(),
            "intercept": self.intercept_,
            "held_out": self.held_out_.tolist(),
            "cv_scores": self.cv_scores_,
            "cv_ndcg": self.cv_ndcg_,
            "cv_hop_scores": self.cv_hop_scores_.tolist(),
            "usage": self.usage_.tolist(),
        }
        save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path, space: SearchSpace) -> "GraphSurrogate":
        """Read a surrogate of the same space.

        Raises:
            QuantDMError: damaged, of another version, or fitted on another space.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get("version") != GRAPH_VERSION or metadata.get("space") != space.digest:
            raise QuantDMError(
                f"{path}: version {metadata.get('version')} for search space {metadata.get('space')}, expected version "
                f"{GRAPH_VERSION} for {space.digest}; it belongs to another model or other options: fit again"
            )
        self = cls(space, **_settings(metadata["settings"]))
        for fold in range(len(metadata["hop_stats"])):
            network = self._network(fold)
            prefix = f"{fold}."
            network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
            self.networks_.append(network.eval())
        self.hop_stats_, self.hop_weights_ = np.array(metadata["hop_stats"]), np.array(metadata["hop_weights"])
        self.held_out_ = np.array(metadata["held_out"])
        self.cv_scores_, self.cv_ndcg_ = metadata["cv_scores"], metadata["cv_ndcg"]
        self.cv_hop_scores_ = np.array(metadata["cv_hop_scores"])
        if metadata["prior_values"] is not None:
            self.prior_values_ = np.array(metadata["prior_values"])
        self.intercept_, self.usage_ = metadata["intercept"], np.array(metadata["usage"])
        return self

    def _network(self, fold: int) -> GraphNet:
        with torch.random.fork_rng(devices=[]):  # the layers draw from the global generator only
            torch.manual_seed(self.random_state * FOLDS + fold)
            return GraphNet(CellTable(self.space), self.plan.hops)

    def _train(self, fold: int, choices: Ints, labels: Floats, weights: Floats) -> tuple[GraphNet, Ints]:
        """Train the network of a fold; return it and the positions of the trials that decided when to stop."""
        network = self._network(fold)

        def report(epochs: int) -> None:
            if self.progress is not None:
                self.progress(fold * self.epochs + epochs, FOLDS * self.epochs)

        watched = train_network(
            network,
            self.plan,
            self.cells(choices, self.plan.levels[0]),
            labels,
            weights,
            settings=Schooling(self.epochs, self.batch_size, self.patience, self.ranking),
            seed=self.random_state * FOLDS + fold,
            on_epoch=report,
        )
        report(self.epochs)
        return network, watched

    def _scores(self, fold: int, network: GraphNet, choices: Ints) -> Floats:
        """Return the hop scores of one network, and the prior's score [T, M]."""
        found = self._hop_scores(network, choices)
        if self.prior_values_ is None:
            return found
        return np.column_stack([found, self.space.gather(self.prior_values_[fold], choices).sum(axis=1)])

    @torch.no_grad()
    def _hop_scores(self, network: GraphNet, choices: Ints) -> Floats:
        """Return the hop scores of one network [T, hops that have roots]."""
        found = []
        with single_thread():
            encoded = network.encode()
            for rows in np.array_split(choices, -(-len(choices) // self.batch_size)):
                edges = self.plan.batched_edges(len(rows))
                found.append(hop_scores(network(self.cells(rows, self.plan.levels[0]), self.plan, edges, encoded)))
        return torch.cat(found).double().numpy()


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    known = {"random_state", "epochs", "batch_size", "patience", "ranking", "prior"}
    if set(record) != known:
        raise QuantDMError(f"graph surrogate: settings {sorted(record)}, expected {sorted(known)}; fit again")
    return record
