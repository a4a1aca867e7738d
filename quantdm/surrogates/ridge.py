"""The baseline: ridge regression on pooled features."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from quantdm.errors import QuantDMError
from quantdm.files import write_json
from quantdm.machine import single_thread
from quantdm.surrogates.additive_model import ADDITIVE_VERSION, FOLDS, MIN_TRIALS, WHY, Floats, Ints
from quantdm.surrogates.features import pool
from quantdm.surrogates.nested import choose_nested
from quantdm.surrogates.ranking import judge_folds, spearman
from quantdm.surrogates.space import SearchSpace
from quantdm.surrogates.trials import check_trials, read_record, split_folds

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1_000.0, 10_000.0)


class RidgeSurrogate:
    """The baseline: ridge regression of y on pooled features, additive over layers; strength by held-out error.

    Every fold chooses its own strength inside its training trials, as the additive surrogate's do.
    """

    name = "ridge"

    def __init__(self, space: SearchSpace, *, random_state: int = 0) -> None:
        self.space = space
        self.random_state = random_state
        self._features = pool(space, logarithms=False)
        self.held_out_: Floats | None = None  # [T] prediction of every trial by its fold, which has not seen it
        self.cv_scores_: list[float] = []  # Spearman of every fold's held-out predictions
        self.cv_ndcg_: list[float] = []  # their NDCG@10
        self._coefficients: Floats | None = None  # [1 + folds, F + 1], slopes per s_f and the intercept

    def fit(self, choices: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> "RidgeSurrogate":
        """Fit to choices [T, L] and labels y [T].

        Raises:
            QuantDMError: fewer than 10 trials, or trials that do not fit the space.
        """
        choices, labels, weights = check_trials(self.space, choices, y, sample_weight, minimum=MIN_TRIALS, why=WHY)
        with single_thread():
            self._fit(self._features.sums(choices), labels, weights)
        return self

    def _fit(self, x: Floats, labels: Floats, weights: Floats) -> None:
        folds = split_folds(len(labels), FOLDS, self.random_state)

        def fit(rows: Ints, strength: float) -> Floats:
            return _ridge(x[rows], labels[rows], weights[rows], strength)

        def path(rows: Ints, strengths: Sequence[float]) -> list[Floats]:
            return [fit(rows, strength) for strength in strengths]

        def predict(coefficients: Floats, rows: Ints) -> Floats:
            return x[rows] @ coefficients[:-1] + coefficients[-1]

        nested = choose_nested(fit, path, predict, STRENGTHS, labels, weights, folds)
        final = fit(np.arange(len(labels)), nested.strength)
        self._coefficients = np.concatenate([final[None], nested.fold_parameters])
        self.held_out_ = nested.held_out
        self.cv_scores_, self.cv_ndcg_ = judge_folds(nested.held_out, labels, folds)

    def predict(self, choices: ArrayLike) -> Floats:
        """Predict y: [T, L] -> [T]."""
        if self._coefficients is None:
            raise QuantDMError("RidgeSurrogate is not fitted; call fit(choices, y) first")
        return self._features.sums(choices) @ self._coefficients[0, :-1] + self._coefficients[0, -1]

    def score(self, choices: ArrayLike, y: ArrayLike) -> float:
        """Return Spearman's rank correlation of the prediction with y."""
        return spearman(self.predict(choices), np.asarray(y, dtype=np.float64))

    def fold_values(self) -> Floats:
        """Return the exact terms of the prediction for the final fit and each fold: [1+K, L, O]."""
        if self._coefficients is None:
            raise QuantDMError("RidgeSurrogate is not fitted; call fit(choices, y) first")
        return np.stack([self._features.project(row[:-1]) for row in self._coefficients])

    def split_difference(self, choice: Ints, reference: Ints) -> Floats:
        """Return the layers' shares of y(choice) - y(reference), for the final fit and each fold: [1+K, L]."""
        values, rows = self.fold_values(), np.arange(len(choice))
        return values[:, rows, choice] - values[:, rows, reference]

    def save(self, path: str | Path) -> None:
        """Write the fitted surrogate as JSON."""
        if self._coefficients is None:
            raise QuantDMError("RidgeSurrogate is not fitted; call fit(choices, y) first")
        assert self.held_out_ is not None
        record = {
            "version": ADDITIVE_VERSION,
            "space": self.space.digest,
            "random_state": self.random_state,
            "coefficients": self._coefficients.tolist(),
            "held_out": self.held_out_.tolist(),
            "cv_scores": self.cv_scores_,
            "cv_ndcg": self.cv_ndcg_,
        }
        write_json(path, record)

    @classmethod
    def load(cls, path: str | Path, space: SearchSpace) -> "RidgeSurrogate":
        """Read a surrogate of the same space.

        Raises:
            QuantDMError: damaged, or fitted on another space.
        """
        record = read_record(path, space, ADDITIVE_VERSION)
        self = cls(space, random_state=record["random_state"])
        self._coefficients, self.held_out_ = np.array(record["coefficients"]), np.array(record["held_out"])
        self.cv_scores_, self.cv_ndcg_ = record["cv_scores"], record["cv_ndcg"]
        return self


def _ridge(x: Floats, y: Floats, weights: Floats, strength: float) -> Floats:
    """Return slopes per unit of x and the intercept [F + 1]; columns are standardised, solved in the dual."""
    mean, offset = np.average(x, axis=0, weights=weights), np.average(y, weights=weights)
    spread = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weights))
    scale = np.where(spread > 1e-9 * (np.abs(mean) + 1e-30), spread, np.inf)  # a constant column has no slope
    root = np.sqrt(weights)
    z = root[:, None] * (x - mean) / scale
    slopes = z.T @ np.linalg.solve(z @ z.T + strength * np.eye(len(y)), root * (y - offset)) / scale
    return np.append(slopes, offset - mean @ slopes)
