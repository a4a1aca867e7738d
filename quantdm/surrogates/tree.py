"""The tree surrogate: gradient-boosted trees on pooled features, explained by exact TreeSHAP.

Trees average, so few trials place them well but cannot teach them that errors multiply. They start from the additive
surrogate, which knows that (`prior`), and learn what it misses.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantdm.errors import QuantDMError
from quantdm.files import write_json
from quantdm.surrogates.additive import AdditiveSurrogate
from quantdm.surrogates.features import pool
from quantdm.surrogates.ranking import judge_folds, spearman
from quantdm.surrogates.space import SearchSpace
from quantdm.surrogates.trials import check_trials, read_record, split_folds
from quantdm.surrogates.two_points import shapley_of_trees, trees_of

Floats = NDArray[np.float64]
FOLDS, MIN_TRIALS = 5, 10
WHY = "five folds need at least two held-out trials each"
TREE_VERSION = 3
ROUNDS = 150
PARAMETERS: dict[str, Any] = {
    "objective": "reg:squarederror",
    "eta": 0.05,
    "max_depth": 3,
    "min_child_weight": 3,
    "subsample": 0.8,
    "colsample_bytree": 0.3,
    "lambda": 1.0,
    "tree_method": "exact",
    "nthread": 1,  # sums in a fixed order: the same trees every time
}


class TreeSurrogate:
    """Predict y with XGBoost from pooled features (`features.pool`), one model on all trials and one per fold.

    With `prior` the trees start from the additive surrogate fitted to the same trials (fold by fold, so what a fold is
    judged on stays unseen, by the choice of the prior's strength as well) and learn the rest; without it they start
    from the mean label. Nothing else is chosen by the trials: the settings of the trees are constants.
    """

    name = "tree"
    version = TREE_VERSION

    def __init__(self, space: SearchSpace, *, random_state: int = 0, rounds: int = ROUNDS, prior: bool = True) -> None:
        self.space = space
        self.random_state = random_state
        self.rounds = rounds
        self.prior = prior
        self.features = pool(space, logarithms=True)
        self.prior_: AdditiveSurrogate | None = None
        self.held_out_: Floats | None = None  # [T] prediction of every trial by its fold, which has not seen it
        self.cv_scores_: list[float] = []  # Spearman of every fold's held-out predictions
        self.cv_ndcg_: list[float] = []  # their NDCG@10
        self._offsets: Floats | None = None  # [1 + folds] mean over its training trials of what each model starts from
        self._boosters: list[Any] = []  # all trials, then one per fold
        self._background: NDArray[np.int64] | None = None  # the training choices: where the explanation looks

    def fit(self, choices: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> "TreeSurrogate":
        """Fit to choices [T, L] and labels y [T].

        Raises:
            QuantDMError: fewer than 10 trials, or trials that do not fit the space.
        """
        choices, labels, weights = check_trials(self.space, choices, y, sample_weight, minimum=MIN_TRIALS, why=WHY)
        x, folds = self.features.transform(choices), split_folds(len(labels), FOLDS, self.random_state)
        self.prior_ = None
        if self.prior:  # it splits the trials into the same folds
            self.prior_ = AdditiveSurrogate(self.space, random_state=self.random_state).fit(choices, labels, weights)
        everything = np.arange(len(labels))
        trained = [everything, *(np.setdiff1d(everything, fold) for fold in folds)]
        self._offsets = np.array([np.average(labels[rows], weights=weights[rows]) for rows in trained])
        starts = self._start(choices)
        self._offsets = np.array([start[rows].mean() for start, rows in zip(starts, trained, strict=True)])
        self._boosters = [
            self._boost(x[rows], labels[rows], weights[rows], start[rows])
            for rows, start in zip(trained, starts, strict=True)
        ]
        self.held_out_ = np.empty(len(labels))
        for booster, start, fold in zip(self._boosters[1:], starts[1:], folds, strict=True):
            self.held_out_[fold] = self._raw(booster, x[fold], start[fold])
        self.cv_scores_, self.cv_ndcg_ = judge_folds(self.held_out_, labels, folds)
        self._background = choices
        return self

    def predict(self, choices: ArrayLike) -> Floats:
        """Predict y: [T, L] -> [T]."""
        booster, rows = self._fitted()[0], self.space.check(choices)
        return self._raw(booster, self.features.transform(rows), self._start(rows)[0])

    def score(self, choices: ArrayLike, y: ArrayLike) -> float:
        """Return Spearman's rank correlation of the prediction with y."""
        return spearman(self.predict(choices), np.asarray(y, dtype=np.float64))

    def contributions(self, choices: ArrayLike) -> Floats:
        """Return the exact TreeSHAP values of every feature, what the prior adds, and the bias: [T, F + 2].

        Rows sum to the prediction. The prior's column is its prediction less its mean over the training trials.
        """
        booster, rows = self._fitted()[0], self.space.check(choices)
        assert self._offsets is not None
        start = self._start(rows)[0]
        parts = self._contributions(booster, self.features.transform(rows), start)
        prior = start - self._offsets[0]
        return np.column_stack([parts[:, :-1], prior, parts[:, -1] - prior])

    def fold_values(self) -> Floats:
        """Return the values of layers and options, for the final model and each fold: [1+K, L, O].

        A pooled feature s_f is a sum over layers, so its TreeSHAP value, seen as a function of s_f over the training
        choices, splits over layers once it is a line: φ_f ≈ α_f + β_f·s_f (least squares), and layer l with option o
        owns β_f·c_f[l, o]. For logarithmic features the line is in log s_f and is linearised at the mean of s_f. Swaps
        of single layers are no alternative: trees are piecewise constant and most swaps cross no threshold. The terms
        of the prior are added as they are.
        """
        boosters = self._fitted()
        assert self._background is not None
        x, sums = self.features.transform(self._background), self.features.sums(self._background)
        centred = x - x.mean(axis=0)
        variance = (centred**2).mean(axis=0)
        usable = variance > 1e-12 * np.maximum(1.0, (x**2).mean(axis=0))
        per_sum = np.where(self.features.is_log, 1 / np.maximum(sums.mean(axis=0), 1e-30), 1.0)
        found = []
        for booster in boosters:
            phi = self._contributions(booster, x, np.zeros(len(x)))[:, :-1]
            slopes = np.where(usable, (centred * phi).mean(axis=0) / np.where(usable, variance, 1.0), 0.0)
            found.append(self.features.project(slopes * per_sum))
        return np.stack(found) + (0.0 if self.prior_ is None else self.prior_.fold_values())

    def split_difference(self, choice: NDArray[np.int64], reference: NDArray[np.int64]) -> Floats:
        """Return the layers' shares of y(choice) - y(reference), for the final model and each fold: [1+K, L].

        A feature's interventional TreeSHAP value goes to the layers that moved its sum that way, in proportion: those
        that moved it the other way get nothing of it. The prior's difference is split as its own.
        """
        boosters, pair = self._fitted(), np.stack([choice, reference])
        own, other = self.features.transform(pair)
        rows = np.arange(len(choice))
        moved = self.features.coefficients[:, rows, choice] - self.features.coefficients[:, rows, reference]  # [F, L]
        along = np.maximum(moved * np.sign(moved.sum(axis=1, keepdims=True)), 0.0)
        share = along / np.maximum(along.sum(axis=1, keepdims=True), 1e-300)
        found = np.stack([shapley_of_trees(trees_of(booster), own, other) @ share for booster in boosters])
        return found + (0.0 if self.prior_ is None else self.prior_.split_difference(choice, reference))

    def save(self, path: str | Path) -> None:
        """Write the fitted surrogate as JSON (XGBoost's own JSON model inside)."""
        boosters = self._fitted()
        assert self._background is not None
        assert self._offsets is not None
        assert self.held_out_ is not None
        record = {
            "version": self.version,
            "space": self.space.digest,
            "random_state": self.random_state,
            "rounds": self.rounds,
            "prior": None if self.prior_ is None else self.prior_.to_dict(),
            "offsets": self._offsets.tolist(),
            "held_out": self.held_out_.tolist(),
            "cv_scores": self.cv_scores_,
            "cv_ndcg": self.cv_ndcg_,
            "background": self._background.tolist(),
            "boosters": [booster.save_raw("json").decode() for booster in boosters],
        }
        write_json(path, record)

    @classmethod
    def load(cls, path: str | Path, space: SearchSpace) -> "TreeSurrogate":
        """Read a surrogate of the same space.

        Raises:
            QuantDMError: damaged, or fitted on another space.
        """
        import xgboost

        record = read_record(path, space, TREE_VERSION)
        prior = record["prior"]
        self = cls(space, random_state=record["random_state"], rounds=record["rounds"], prior=prior is not None)
        self.prior_ = None if prior is None else AdditiveSurrogate.from_dict(prior, space)
        self._offsets, self.held_out_ = np.array(record["offsets"]), np.array(record["held_out"])
        self.cv_scores_, self.cv_ndcg_ = record["cv_scores"], record["cv_ndcg"]
        self._background = np.array(record["background"])
        self._boosters = [xgboost.Booster({"nthread": 1}, model_file=bytearray(b.encode())) for b in record["boosters"]]
        return self

    def _start(self, choices: NDArray[np.int64]) -> Floats:
        """Return where the final model and each fold's start, [1+K, T]: the prior, or their mean training label."""
        if self.prior_ is not None:
            return self.prior_.predict_folds(choices)
        assert self._offsets is not None
        return np.repeat(self._offsets[:, None], len(choices), axis=1)

    def _boost(self, x: Floats, y: Floats, weights: Floats, start: Floats) -> Any:
        import xgboost

        data = xgboost.DMatrix(x, label=y, weight=weights, base_margin=start, nthread=1)
        return xgboost.train({**PARAMETERS, "seed": self.random_state}, data, num_boost_round=self.rounds)

    def _raw(self, booster: Any, x: Floats, start: Floats) -> Floats:
        import xgboost

        return booster.predict(xgboost.DMatrix(x, base_margin=start, nthread=1)).astype(np.float64)

    def _contributions(self, booster: Any, x: Floats, start: Floats) -> Floats:
        import xgboost

        data = xgboost.DMatrix(x, base_margin=start, nthread=1)
        return booster.predict(data, pred_contribs=True).astype(np.float64)

    def _fitted(self) -> list[Any]:
        if not self._boosters:
            raise QuantDMError("TreeSurrogate is not fitted; call fit(choices, y) first")
        return self._boosters
