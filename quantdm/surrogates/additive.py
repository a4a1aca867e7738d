"""The additive surrogate: a sum over layers predicts, so the knapsack on its terms is the exact optimum."""

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
    Floats,
    Ints,
    head_of,
    log_terms,
    make_design,
    predict_log_fid,
    solve,
)
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
    one-layer sensitivity.
    """

    name = "additive"

    def __init__(self, space: SearchSpace, *, random_state: int = 0) -> None:
        self.space = space
        self.random_state = random_state
        self._design = make_design(space)
        self.cv_scores_: list[float] = []  # held-out Spearman of every fold
        self.cv_ndcg_: list[float] = []  # held-out NDCG@10
        self.strength_: float | None = None
        self._theta: Floats | None = None
        self._fold_thetas: Floats | None = None
        self._reference: Ints | None = None

    def fit(self, choices: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> "AdditiveSurrogate":
        """Fit to choices [T, L] and labels y [T]; the prior's strength is the one with the least held-out error.

        Raises:
            QuantDMError: fewer than 10 trials, or trials that do not fit the space.
        """
        choices, labels, weights = check_trials(self.space, choices, y, sample_weight, minimum=MIN_TRIALS, why=WHY)
        folds = split_folds(len(labels), FOLDS, self.random_state)
        errors, thetas, predicted = [], [], []
        with single_thread():
            for strength in STRENGTHS:
                held_out, found = np.empty(len(labels)), []
                for fold in folds:
                    train = np.setdiff1d(np.arange(len(labels)), fold)
                    found.append(solve(self._design, choices[train], -labels[train], weights[train], strength))
                    held_out[fold] = -predict_log_fid(self._design, found[-1], choices[fold])
                errors.append(float((weights * (held_out - labels) ** 2).sum()))
                thetas.append(np.stack(found))
                predicted.append(held_out)
            best = int(np.argmin(errors))
            self.strength_, self._fold_thetas = STRENGTHS[best], thetas[best]
            self.cv_scores_, self.cv_ndcg_ = judge_folds(predicted[best], labels, folds)
            self._theta = solve(self._design, choices, -labels, weights, self.strength_)
        self._reference = choices[np.argsort(labels)[len(labels) // 2]]
        return self

    def predict(self, choices: ArrayLike) -> Floats:
        """Predict y = -log(fid_fp): [T, L] -> [T]."""
        return -predict_log_fid(self._design, self._fitted, self.space.check(choices))

    def predict_folds(self, choices: ArrayLike) -> Floats:
        """Predict y with the final fit and with each fold's, which has not seen that fold: [T, L] -> [1+K, T]."""
        final, rows = self._fitted, self.space.check(choices)
        assert self._fold_thetas is not None
        return np.stack([-predict_log_fid(self._design, theta, rows) for theta in (final, *self._fold_thetas)])

    def score(self, choices: ArrayLike, y: ArrayLike) -> float:
        """Return Spearman's rank correlation of the prediction with y."""
        return spearman(self.predict(choices), np.asarray(y, dtype=np.float64))

    def fold_values(self) -> Floats:
        """Return the terms of the sum in units of y at the median trial, for the final fit and each fold: [1+K, L, O].

        dy = -b / (c + S) · dS: one factor for all cells, so the ranking of configurations is the model's own.
        """
        final = self._fitted
        assert self._fold_thetas is not None
        return np.stack([self._terms(theta) for theta in (final, *self._fold_thetas)])

    def to_dict(self) -> dict[str, Any]:
        """Return the fitted surrogate as a JSON record with a version."""
        final = self._fitted
        assert self._fold_thetas is not None
        assert self._reference is not None
        return {
            "version": ADDITIVE_VERSION,
            "space": self.space.digest,
            "random_state": self.random_state,
            "strength": self.strength_,
            "theta": final.tolist(),
            "fold_thetas": self._fold_thetas.tolist(),
            "reference": self._reference.tolist(),
            "cv_scores": self.cv_scores_,
            "cv_ndcg": self.cv_ndcg_,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any], space: SearchSpace) -> "AdditiveSurrogate":
        """Build a surrogate from `to_dict`'s record; its space must be `space`."""
        self = cls(space, random_state=record["random_state"])
        self.strength_, self.cv_scores_, self.cv_ndcg_ = record["strength"], record["cv_scores"], record["cv_ndcg"]
        self._theta, self._fold_thetas = np.array(record["theta"]), np.array(record["fold_thetas"])
        self._reference = np.array(record["reference"])
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
        if self._theta is None:
            raise QuantDMError("AdditiveSurrogate is not fitted; call fit(choices, y) first")
        return self._theta

    def _terms(self, theta: Floats) -> Floats:
        _, b, _, c = head_of(theta)
        terms = np.exp(log_terms(self._design, theta))
        assert self._reference is not None
        return -b / (c + terms[np.arange(len(terms)), self._reference].sum()) * terms
