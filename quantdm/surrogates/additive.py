"""The additive surrogate: a sum over layers predicts, so the knapsack on its terms is the exact optimum."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from quantdm.errors import QuantDMError
from quantdm.files import write_json
from quantdm.machine import single_thread
from quantdm.surrogates.additive_model import (
    ADDITIVE_VERSION,
    FOLDS,
    MIN_TRIALS,
    WHY,
    AdditiveCurve,
    Floats,
    Ints,
    linear_terms,
    make_design,
    median_trial,
    predict_log_fid,
    straight_line,
)
from quantdm.surrogates.gauss_newton import solve, solve_path
from quantdm.surrogates.nested import choose_nested
from quantdm.surrogates.ranking import judge_folds, spearman
from quantdm.surrogates.space import SearchSpace
from quantdm.surrogates.trials import check_trials, read_record, split_folds

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class AdditiveSurrogate:
    """Predict y = -log(fid_fp) from positive learned weights on one-layer noise errors.

    log fid_fp = a + b · log(c + S),  S = sum over layers of w[l] · v[o] · u[type, o] · e[l, o]^gamma

    Errors of independent layers add up in the output and fid_fp grows as a power of that sum, hence the link; c is what
    stays at full precision (label noise). The link is monotone, so the choice that is best for S is best for the
    prediction, and S is additive. log w is a sum of effects of the operation type, the depth band, their cell and the
    layer, log v of the method, the bit-width and the option, log u of their pairing; each is drawn to 0 by a Gaussian
    prior whose common strength is chosen by the held-out error. With a strong prior the surrogate is the plain
    one-layer sensitivity. Every fold chooses its own strength, by folds inside its training trials: nothing that is
    judged on a fold has seen a label of it.
    """

    name = "additive"

    def __init__(self, space: SearchSpace, *, random_state: int = 0) -> None:
        self.space = space
        self.random_state = random_state
        self._design = make_design(space)
        self.held_out_: Floats | None = None  # [T] prediction of every trial by its fold, which has not seen it
        self.cv_scores_: list[float] = []  # Spearman of every fold's held-out predictions
        self.cv_ndcg_: list[float] = []  # their NDCG@10
        self.strength_: float | None = None
        self.fold_strengths_: tuple[float, ...] = ()
        self._thetas: Floats | None = None  # [1 + folds, P] all trials, then one per fold
        self._references: Ints | None = None  # [1 + folds, L] the median training trial of each

    def fit(self, choices: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> "AdditiveSurrogate":
        """Fit to choices [T, L] and labels y [T]; the prior's strength is the one with the least held-out error.

        Raises:
            QuantDMError: fewer than 10 trials, or trials that do not fit the space.
        """
        choices, labels, weights = check_trials(self.space, choices, y, sample_weight, minimum=MIN_TRIALS, why=WHY)
        folds = split_folds(len(labels), FOLDS, self.random_state)
        curve = AdditiveCurve(self._design)

        def fit(rows: Ints, strength: float) -> Floats:
            return solve(curve, choices[rows], -labels[rows], weights[rows], strength)

        def path(rows: Ints, strengths: Sequence[float]) -> list[Floats]:
            return solve_path(curve, choices[rows], -labels[rows], weights[rows], strengths)

        def predict(theta: Floats, rows: Ints) -> Floats:
            return -predict_log_fid(self._design, theta, choices[rows])

        with single_thread():
            nested = choose_nested(fit, path, predict, STRENGTHS, labels, weights, folds)
            final = fit(np.arange(len(labels)), nested.strength)
        self.strength_, self.fold_strengths_ = nested.strength, nested.fold_strengths
        self._thetas = np.concatenate([final[None], nested.fold_parameters])
        trained = [np.arange(len(labels)), *(np.setdiff1d(np.arange(len(labels)), fold) for fold in folds)]
        self._references = np.stack([median_trial(choices[rows], labels[rows]) for rows in trained])
        self.held_out_ = nested.held_out
        self.cv_scores_, self.cv_ndcg_ = judge_folds(nested.held_out, labels, folds)
        return self

    def predict(self, choices: ArrayLike) -> Floats:
        """Predict y = -log(fid_fp): [T, L] -> [T]."""
        return -predict_log_fid(self._design, self._fitted[0], self.space.check(choices))

    def predict_folds(self, choices: ArrayLike) -> Floats:
        """Predict y with the final fit and with each fold's, which has not seen that fold: [T, L] -> [1+K, T]."""
        thetas, rows = self._fitted, self.space.check(choices)
        return np.stack([-predict_log_fid(self._design, theta, rows) for theta in thetas])

    def score(self, choices: ArrayLike, y: ArrayLike) -> float:
        """Return Spearman's rank correlation of the prediction with y."""
        return spearman(self.predict(choices), np.asarray(y, dtype=np.float64))

    def fold_values(self) -> Floats:
        """Return the terms of the sum in units of y at the median trial, for the final fit and each fold: [1+K, L, O].

        dy = -b / (c + S) · dS: one factor for all cells, so the ranking of configurations is the model's own.
        """
        thetas = self._fitted
        assert self._references is not None
        pairs = zip(thetas, self._references, strict=True)
        return np.stack([linear_terms(self._design, theta, reference) for theta, reference in pairs])

    def split_difference(self, choice: Ints, reference: Ints) -> Floats:
        """Return the layers' shares of y(choice) - y(reference), for the final fit and each fold: [1+K, L]."""
        return np.stack([straight_line(self._design, theta, choice, reference) for theta in self._fitted])

    def to_dict(self) -> dict[str, Any]:
        """Return the fitted surrogate as a JSON record with a version."""
        thetas = self._fitted
        assert self._references is not None
        assert self.held_out_ is not None
        return {
            "version": ADDITIVE_VERSION,
            "space": self.space.digest,
            "random_state": self.random_state,
            "strength": self.strength_,
            "fold_strengths": list(self.fold_strengths_),
            "thetas": thetas.tolist(),
            "references": self._references.tolist(),
            "held_out": self.held_out_.tolist(),
            "cv_scores": self.cv_scores_,
            "cv_ndcg": self.cv_ndcg_,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any], space: SearchSpace) -> "AdditiveSurrogate":
        """Build a surrogate from `to_dict`'s record; its space must be `space`."""
        self = cls(space, random_state=record["random_state"])
        self.strength_, self.fold_strengths_ = record["strength"], tuple(record["fold_strengths"])
        self.held_out_ = np.array(record["held_out"])
        self.cv_scores_, self.cv_ndcg_ = record["cv_scores"], record["cv_ndcg"]
        self._thetas, self._references = np.array(record["thetas"]), np.array(record["references"])
        return self

    def save(self, path: str | Path) -> None:
        """Write the fitted surrogate as JSON."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path, space: SearchSpace) -> "AdditiveSurrogate":
        """Read a surrogate of the same space.

        Raises:
            QuantDMError: damaged, or fitted on another space.
        """
        return cls.from_dict(read_record(path, space, ADDITIVE_VERSION), space)

    @property
    def _fitted(self) -> Floats:
        if self._thetas is None:
            raise QuantDMError("AdditiveSurrogate is not fitted; call fit(choices, y) first")
        return self._thetas
