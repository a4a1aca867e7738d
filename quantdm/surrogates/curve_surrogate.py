"""What surrogates of the form log fid_fp = a + b · log(c + S) share: the nested fit, predictions, the record."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike

from quantdm.errors import QuantDMError
from quantdm.files import write_json
from quantdm.machine import single_thread
from quantdm.surrogates.additive_model import FOLDS, MIN_TRIALS, WHY, Floats, Ints, median_trial
from quantdm.surrogates.gauss_newton import Curve, Scaled, solve, solve_path
from quantdm.surrogates.nested import choose_nested
from quantdm.surrogates.ranking import judge_folds, spearman
from quantdm.surrogates.space import SearchSpace
from quantdm.surrogates.trials import check_trials, read_record, split_folds

Setting = tuple[float, float]  # looseness, strength


class CurveSurrogate(ABC):
    """A curve of log fid_fp that is fitted to all trials, and to those of every fold.

    All parameters are drawn to their prior by a common strength, the one of `strengths` with the least held-out error,
    and what a curve adds to the additive model may leave its prior as far as the better one of `looseness` says. Every
    fold chooses its own, by folds inside its training trials: nothing that is judged on a fold has seen a label of it.
    """

    name: ClassVar[str]
    version: ClassVar[int]  # of the record
    strengths: ClassVar[tuple[float, ...]]
    looseness: ClassVar[tuple[float, ...]] = (1.0,)

    def __init__(self, space: SearchSpace, *, random_state: int = 0) -> None:
        self.space = space
        self.random_state = random_state
        self.held_out_: Floats | None = None  # [T] prediction of every trial by its fold, which has not seen it
        self.cv_scores_: list[float] = []  # Spearman of every fold's held-out predictions
        self.cv_ndcg_: list[float] = []  # their NDCG@10
        self.strength_: float | None = None
        self.looseness_: float | None = None
        self.fold_strengths_: tuple[float, ...] = ()
        self._thetas: Floats | None = None  # [1 + folds, P] all trials, then one per fold
        self._references: Ints | None = None  # [1 + folds, L] the median training trial of each

    @property
    @abstractmethod
    def curve(self) -> Curve:
        """The curve that is fitted."""

    def scale_of(self, looseness: float) -> Floats:
        """Return how far every parameter may leave its prior [P]: 1, but for those that `looseness` speaks of."""
        return np.ones(len(self.curve.start(0.0)))

    def fit(self, choices: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Fit to choices [T, L] and labels y [T]; the prior's strength is the one with the least held-out error.

        Raises:
            QuantDMError: fewer than 10 trials, or trials that do not fit the space.
        """
        choices, labels, weights = check_trials(self.space, choices, y, sample_weight, minimum=MIN_TRIALS, why=WHY)
        folds = split_folds(len(labels), FOLDS, self.random_state)

        curves = {loose: Scaled(self.curve, self.scale_of(loose)) for loose in self.looseness}

        def fit(rows: Ints, setting: Setting) -> Floats:
            loose, strength = setting
            curve = curves[loose]
            return curve.scale * solve(curve, choices[rows], -labels[rows], weights[rows], strength)

        def path(rows: Ints, settings: Sequence[Setting]) -> list[Floats]:
            found: dict[Setting, Floats] = {}
            for loose, curve in curves.items():
                wanted = [strength for other, strength in settings if other == loose]
                thetas = solve_path(curve, choices[rows], -labels[rows], weights[rows], wanted)
                found |= {(loose, s): curve.scale * theta for s, theta in zip(wanted, thetas, strict=True)}
            return [found[setting] for setting in settings]

        def predict(theta: Floats, rows: Ints) -> Floats:
            return -self.curve.log_fid(theta, choices[rows])

        with single_thread():
            settings = [(loose, strength) for loose in self.looseness for strength in self.strengths]
            nested = choose_nested(fit, path, predict, settings, labels, weights, folds)
            final = fit(np.arange(len(labels)), nested.strength)
        self.looseness_, self.strength_ = nested.strength
        self.fold_strengths_ = tuple(strength for _, strength in nested.fold_strengths)
        self._thetas = np.concatenate([final[None], nested.fold_parameters])
        trained = [np.arange(len(labels)), *(np.setdiff1d(np.arange(len(labels)), fold) for fold in folds)]
        self._references = np.stack([median_trial(choices[rows], labels[rows]) for rows in trained])
        self.held_out_ = nested.held_out
        self.cv_scores_, self.cv_ndcg_ = judge_folds(nested.held_out, labels, folds)
        return self

    def predict(self, choices: ArrayLike) -> Floats:
        """Predict y = -log(fid_fp): [T, L] -> [T]."""
        return -self.curve.log_fid(self.thetas[0], self.space.check(choices))

    def predict_folds(self, choices: ArrayLike) -> Floats:
        """Predict y with the final fit and with each fold's, which has not seen that fold: [T, L] -> [1+K, T]."""
        thetas, rows = self.thetas, self.space.check(choices)
        return np.stack([-self.curve.log_fid(theta, rows) for theta in thetas])

    def score(self, choices: ArrayLike, y: ArrayLike) -> float:
        """Return Spearman's rank correlation of the prediction with y."""
        return spearman(self.predict(choices), np.asarray(y, dtype=np.float64))

    @property
    def thetas(self) -> Floats:
        """The parameters of the final fit and of every fold's: [1+K, P].

        Raises:
            QuantDMError: not fitted.
        """
        if self._thetas is None:
            raise QuantDMError(f"{type(self).__name__} is not fitted; call fit(choices, y) first")
        return self._thetas

    @property
    def references(self) -> Ints:
        """The median training trial of the final fit and of every fold's: [1+K, L]."""
        assert self._references is not None
        return self._references

    def to_dict(self) -> dict[str, Any]:
        """Return the fitted surrogate as a JSON record with a version."""
        thetas = self.thetas
        assert self.held_out_ is not None
        return {
            "version": self.version,
            "space": self.space.digest,
            "random_state": self.random_state,
            "strength": self.strength_,
            "looseness": self.looseness_,
            "fold_strengths": list(self.fold_strengths_),
            "thetas": thetas.tolist(),
            "references": self.references.tolist(),
            "held_out": self.held_out_.tolist(),
            "cv_scores": self.cv_scores_,
            "cv_ndcg": self.cv_ndcg_,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any], space: SearchSpace) -> Self:
        """Build a surrogate from `to_dict`'s record; its space must be `space`."""
        self = cls(space, random_state=record["random_state"])
        self.strength_, self.fold_strengths_ = record["strength"], tuple(record["fold_strengths"])
        self.looseness_ = record.get("looseness")
        self.held_out_ = np.array(record["held_out"])
        self.cv_scores_, self.cv_ndcg_ = record["cv_scores"], record["cv_ndcg"]
        self._thetas, self._references = np.array(record["thetas"]), np.array(record["references"])
        return self

    def save(self, path: str | Path) -> None:
        """Write the fitted surrogate as JSON."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path, space: SearchSpace) -> Self:
        """Read a surrogate of the same space.

        Raises:
            QuantDMError: damaged, of another version, or fitted on another space.
        """
        return cls.from_dict(read_record(path, space, cls.version), space)
