"""The graph surrogate: amplitudes of errors that meet along the data flow (docs/method.md, Surrogates)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantdm.errors import QuantDMError
from quantdm.files import write_json
from quantdm.machine import single_thread
from quantdm.surrogates.additive_model import FOLDS, MIN_TRIALS, WHY, head_of, median_trial
from quantdm.surrogates.amplitudes import make_net
from quantdm.surrogates.block_scores import layer_values
from quantdm.surrogates.gauss_newton import solve, solve_path
from quantdm.surrogates.meeting import secants, shapley
from quantdm.surrogates.nested import choose_nested
from quantdm.surrogates.ranking import judge_folds, spearman
from quantdm.surrogates.space import SearchSpace
from quantdm.surrogates.trials import check_trials, read_record, split_folds

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
GRAPH_VERSION = 4
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0)
BACKGROUND = 64  # trials around which values of single layers are looked at


class GraphSurrogate:
    """Rank configurations by amplitudes of errors that meet inside blocks (`quantdm.surrogates.amplitudes`).

    log fid_fp = a + b · log(c + S), where S is exactly additive over the roots of blocks; so what predicts is what is
    explained, and the whole-block knapsack on S is the exact optimum of the prediction. Before it learns it is the
    plain one-layer sensitivity, and without interactions it is the additive surrogate. All parameters are drawn to
    their prior by a common strength, chosen by the held-out error; every fold chooses its own inside its training
    trials. The final network is fitted to all trials; those of the folds tell how sure it is.
    """

    name = "graph"

    def __init__(self, space: SearchSpace, *, random_state: int = 0) -> None:
        self.space = space
        self.random_state = random_state
        self.net = make_net(space)
        self.held_out_: Floats | None = None  # [T] prediction of every trial by its fold, which has not seen it
        self.cv_scores_: list[float] = []  # Spearman of every fold's held-out predictions
        self.cv_ndcg_: list[float] = []  # their NDCG@10
        self.strength_: float | None = None
        self.fold_strengths_: tuple[float, ...] = ()
        self._thetas: Floats | None = None  # [1 + folds, P] all trials, then one per fold
        self._references: Ints | None = None  # [1 + folds, L] the median training trial of each
        self._background: Ints | None = None  # [N, L] of the better half of the trials: there the answer lies

    def fit(self, choices: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> "GraphSurrogate":
        """Fit to choices [T, L] and labels y [T]; the prior's strength is the one with the least held-out error.

        Raises:
            QuantDMError: fewer than 10 trials, or trials that do not fit the space.
        """
        choices, labels, weights = check_trials(self.space, choices, y, sample_weight, minimum=MIN_TRIALS, why=WHY)
        folds = split_folds(len(labels), FOLDS, self.random_state)

        def fit(rows: Ints, strength: float) -> Floats:
            return solve(self.net, choices[rows], -labels[rows], weights[rows], strength)

        def path(rows: Ints, strengths: Sequence[float]) -> list[Floats]:
            return solve_path(self.net, choices[rows], -labels[rows], weights[rows], strengths)

        def predict(theta: Floats, rows: Ints) -> Floats:
            return -self.net.log_fid(theta, choices[rows])

        with single_thread():
            nested = choose_nested(fit, path, predict, STRENGTHS, labels, weights, folds)
            final = fit(np.arange(len(labels)), nested.strength)
        self.strength_, self.fold_strengths_ = nested.strength, nested.fold_strengths
        self._thetas = np.concatenate([final[None], nested.fold_parameters])
        trained = [np.arange(len(labels)), *(np.setdiff1d(np.arange(len(labels)), fold) for fold in folds)]
        self._references = np.stack([median_trial(choices[rows], labels[rows]) for rows in trained])
        self._background = _better_half(choices, labels)
        self.held_out_ = nested.held_out
        self.cv_scores_, self.cv_ndcg_ = judge_folds(nested.held_out, labels, folds)
        return self

    def predict(self, choices: ArrayLike) -> Floats:
        """Predict y = -log(fid_fp): [T, L] -> [T]."""
        return -self.net.log_fid(self.thetas[0], self.space.check(choices))

    def predict_folds(self, choices: ArrayLike) -> Floats:
        """Predict y with the final fit and with each fold's, which has not seen that fold: [T, L] -> [1+K, T]."""
        rows = self.space.check(choices)
        return np.stack([-self.net.log_fid(theta, rows) for theta in self.thetas])

    def score(self, choices: ArrayLike, y: ArrayLike) -> float:
        """Return Spearman's rank correlation of the prediction with y."""
        return spearman(self.predict(choices), np.asarray(y, dtype=np.float64))

    def hop_scores(self, choices: ArrayLike) -> Floats:
        """Return the cost that is read at the roots of every hop count: [T, L] -> [T, hops + 1].

        Column m holds the blocks whose farthest layer is m hops away from the root (0: single layers); their sum is S.
        """
        alone, roots = self.net.energies(self.thetas[0], self.space.check(choices))
        hops = self.net.wiring.hops
        columns = [roots[:, hops == m].sum(axis=1) for m in range(1, int(hops.max(initial=0)) + 1)]
        return np.stack([alone.sum(axis=1), *columns], axis=1)

    def units(self) -> Floats:
        """Return what one unit of cost changes y by at the median trial, for the final fit and each fold: [1+K]."""
        thetas = self.thetas
        assert self._references is not None
        found = []
        for theta, reference in zip(thetas, self._references, strict=True):
            _, b, _, c = head_of(theta)
            alone, roots = self.net.energies(theta, reference[None])
            found.append(-b / (c + alone.sum() + roots.sum()))
        return np.array(found)

    def fold_values(self) -> Floats:
        """Return the layer values of the final fit and of every fold: [1+K, L, O] (see `block_scores`)."""
        return layer_values(self)

    def split_difference(self, choice: Ints, reference: Ints) -> Floats:
        """Return the layers' shares of y(choice) - y(reference), for the final fit and each fold: [1+K, L].

        Shapley values of the cost, exact inside blocks, times the secant of the logarithm.
        """
        return np.stack([shapley(self.net, theta, choice, reference) for theta in self.thetas])

    def split_features(self, choice: Ints, reference: Ints) -> Floats:
        """Return the same difference by secants, over layers and what their terms are made of: [1+K, L, FEATURES].

        `meeting.FEATURES` names the last axis. It says what the network uses, not what hurts the image.
        """
        return np.stack([secants(self.net, theta, choice, reference) for theta in self.thetas])

    @property
    def thetas(self) -> Floats:
        """The parameters of the final fit and of every fold's: [1+K, P].

        Raises:
            QuantDMError: not fitted.
        """
        if self._thetas is None:
            raise QuantDMError("GraphSurrogate is not fitted; call fit(choices, y) first")
        return self._thetas

    @property
    def background(self) -> Ints:
        """Trials around which values of single layers are looked at: [N, L]."""
        assert self._background is not None
        return self._background

    def save(self, path: str | Path) -> None:
        """Write the fitted surrogate as JSON."""
        thetas = self.thetas
        assert self._references is not None
        assert self.held_out_ is not None
        record = {
            "version": GRAPH_VERSION,
            "space": self.space.digest,
            "random_state": self.random_state,
            "strength": self.strength_,
            "fold_strengths": list(self.fold_strengths_),
            "thetas": thetas.tolist(),
            "references": self._references.tolist(),
            "background": self.background.tolist(),
            "held_out": self.held_out_.tolist(),
            "cv_scores": self.cv_scores_,
            "cv_ndcg": self.cv_ndcg_,
        }
        write_json(path, record)

    @classmethod
    def load(cls, path: str | Path, space: SearchSpace) -> "GraphSurrogate":
        """Read a surrogate of the same space.

        Raises:
            QuantDMError: damaged, of another version, or fitted on another space.
        """
        record = read_record(path, space, GRAPH_VERSION)
        self = cls(space, random_state=record["random_state"])
        self.strength_, self.fold_strengths_ = record["strength"], tuple(record["fold_strengths"])
        self.held_out_ = np.array(record["held_out"])
        self.cv_scores_, self.cv_ndcg_ = record["cv_scores"], record["cv_ndcg"]
        self._thetas, self._references = np.array(record["thetas"]), np.array(record["references"])
        self._background = np.array(record["background"])
        return self


def _better_half(choices: Ints, labels: Floats) -> Ints:
    """Return at most 64 trials, spread evenly over the ranks of the better half."""
    better = np.argsort(-labels)[: max(1, len(labels) // 2)]
    return choices[better[np.unique(np.linspace(0, len(better) - 1, BACKGROUND).astype(np.int64))]]
