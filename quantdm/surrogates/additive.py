"""Additive surrogates: a sum over layers predicts, so the knapsack on its terms is the exact optimum of the prediction.

`AdditiveSurrogate` is the one that wins in performance.md section 5: learned positive weights on the one-layer noise
errors. `RidgeSurrogate` is the baseline: linear in the pooled features.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantdm.errors import QuantDMError
from quantdm.files import write_json
from quantdm.surrogates.features import band_index, pool, type_index
from quantdm.surrogates.losses import ndcg, relevance
from quantdm.surrogates.space import SearchSpace, check_trials, read_record, single_thread, spearman, split_folds

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
FOLDS, MIN_TRIALS = 5, 10
WHY = "five folds need at least two held-out trials each"
ADDITIVE_VERSION = 3
NOISE_SD = 0.1  # unit of the penalty: label noise of log(fid_fp), performance.md section 5
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
# Standard deviations, in log units, by which the parts of a layer's weight may differ before the data speak. Chosen on
# 160 trials of each reference pipeline: without "pair" the rank correlation near the budget falls by 0.015 to 0.02.
PRIOR = {"type": 0.6, "band": 0.4, "cell": 0.3, "layer": 0.5, "method": 0.4, "width": 0.4, "option": 0.2, "pair": 0.4}
HEAD_PRIOR = ((0.0, 10.0), (0.0, 0.5), (0.0, 0.25), (-3.0, 1.0))  # mean and sd of a, log b, log gamma, log c


@dataclass(frozen=True, eq=False)
class _Design:
    """The fixed part of the model: log errors [L, O] and the columns of the log weights of layers and options."""

    log_error: Floats
    layer: Floats  # [L, P]
    option: Floats  # [O, Q]
    kind: Floats  # [L, types], one-hot: the effects of (operation type, option) pairs


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
        self._design = _design(space)
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
                    found.append(_solve(self._design, choices[train], -labels[train], weights[train], strength))
                    held_out[fold] = -_predict(self._design, found[-1], choices[fold])
                errors.append(float((weights * (held_out - labels) ** 2).sum()))
                thetas.append(np.stack(found))
                predicted.append(held_out)
            best = int(np.argmin(errors))
            self.strength_, self._fold_thetas = STRENGTHS[best], thetas[best]
            self.cv_scores_, self.cv_ndcg_ = _judge(predicted[best], labels, folds)
            self._theta = _solve(self._design, choices, -labels, weights, self.strength_)
        self._reference = choices[np.argsort(labels)[len(labels) // 2]]
        return self

    def predict(self, choices: ArrayLike) -> Floats:
        """Predict y = -log(fid_fp): [T, L] -> [T]."""
        return -_predict(self._design, self._fitted, self.space.check(choices))

    def predict_folds(self, choices: ArrayLike) -> Floats:
        """Predict y with the final fit and with each fold's, which has not seen that fold: [T, L] -> [1+K, T]."""
        final, rows = self._fitted, self.space.check(choices)
        assert self._fold_thetas is not None
        return np.stack([-_predict(self._design, theta, rows) for theta in (final, *self._fold_thetas)])

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
        _, b, _, c = _head(theta)
        terms = np.exp(_log_terms(self._design, theta))
        assert self._reference is not None
        return -b / (c + terms[np.arange(len(terms)), self._reference].sum()) * terms


class RidgeSurrogate:
    """The baseline: ridge regression of y on pooled features, additive over layers; strength by held-out error."""

    name = "ridge"

    def __init__(self, space: SearchSpace, *, random_state: int = 0) -> None:
        self.space = space
        self.random_state = random_state
        self._features = pool(space, logarithms=False)
        self.cv_scores_: list[float] = []  # held-out Spearman of every fold
        self.cv_ndcg_: list[float] = []  # held-out NDCG@10
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
        best_error = np.inf
        for strength in 10.0 ** np.arange(-1, 5):
            held_out, found = np.empty(len(labels)), []
            for fold in folds:
                train = np.setdiff1d(np.arange(len(labels)), fold)
                found.append(_ridge(x[train], labels[train], weights[train], strength))
                held_out[fold] = x[fold] @ found[-1][:-1] + found[-1][-1]
            error = float((weights * (held_out - labels) ** 2).sum())
            if error < best_error:
                best_error = error
                self._coefficients = np.stack([_ridge(x, labels, weights, strength), *found])
                self.cv_scores_, self.cv_ndcg_ = _judge(held_out, labels, folds)

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

    def save(self, path: str | Path) -> None:
        """Write the fitted surrogate as JSON."""
        if self._coefficients is None:
            raise QuantDMError("RidgeSurrogate is not fitted; call fit(choices, y) first")
        record = {
            "version": ADDITIVE_VERSION,
            "space": self.space.digest,
            "random_state": self.random_state,
            "coefficients": self._coefficients.tolist(),
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
        self._coefficients = np.array(record["coefficients"])
        self.cv_scores_, self.cv_ndcg_ = record["cv_scores"], record["cv_ndcg"]
        return self


def _judge(held_out: Floats, labels: Floats, folds: list[Ints]) -> tuple[list[float], list[float]]:
    """Return Spearman's correlation and NDCG@10 of every fold's held-out predictions."""
    known = [np.delete(labels, fold) for fold in folds]
    gains = [relevance(labels[fold], rest) for fold, rest in zip(folds, known, strict=True)]
    return (
        [spearman(held_out[fold], labels[fold]) for fold in folds],
        [ndcg(gain, held_out[fold]) for fold, gain in zip(folds, gains, strict=True)],
    )


def _design(space: SearchSpace) -> _Design:
    """Build the columns, each scaled by the prior standard deviation of its effect."""
    _, type_of = type_index(space)
    band_of = band_index(space)
    cells = np.unique(type_of * (band_of.max() + 1) + band_of, return_inverse=True)[1]
    methods = [(option.method, option.granularity, option.group_size) for option in space.options]
    method_of = np.array([methods.index(method) for method in methods])
    width_of = np.unique([option.bits for option in space.options], return_inverse=True)[1]
    layer = {"type": type_of, "band": band_of, "cell": cells, "layer": np.arange(len(type_of))}
    option = {"method": method_of, "width": width_of, "option": np.arange(len(methods))}
    error = np.maximum(space.noise_error, 1e-9 * space.noise_error.max())
    # unit: the typical size of S, so that c and the prior mean of every log weight mean the same in every model
    log_error = np.log(error) - np.log(error.mean(axis=1).sum())
    return _Design(log_error, _columns(layer), _columns(option), PRIOR["pair"] * np.eye(type_of.max() + 1)[type_of])


def _columns(parts: dict[str, Ints]) -> Floats:
    return np.concatenate([PRIOR[name] * np.eye(part.max() + 1)[part] for name, part in parts.items()], axis=1)


def _head(theta: Floats) -> tuple[float, float, float, float]:
    a, log_b, log_gamma, log_c = (mean + sd * t for (mean, sd), t in zip(HEAD_PRIOR, theta[:4], strict=True))
    return a, float(np.exp(log_b)), float(np.exp(log_gamma)), float(np.exp(log_c))


def _log_terms(design: _Design, theta: Floats) -> Floats:
    """Return log(w[l] · v[o] · u[type, o] · e[l, o]^gamma) [L, O]."""
    parts = np.split(theta[4:], np.cumsum([design.layer.shape[1], design.option.shape[1]]))
    log_w, log_v = design.layer @ parts[0], design.option @ parts[1]
    log_u = design.kind @ parts[2].reshape(design.kind.shape[1], -1)
    return log_w[:, None] + log_v[None] + log_u + _head(theta)[2] * design.log_error


def _predict(design: _Design, theta: Floats, choices: Ints) -> Floats:
    """Return log fid_fp = a + b · log(c + S): [T, L] -> [T]."""
    a, b, _, c = _head(theta)
    terms = np.exp(_log_terms(design, theta))
    return a + b * np.log(c + terms[np.arange(len(terms)), choices].sum(axis=1))


def _jacobian(design: _Design, theta: Floats, choices: Ints) -> Floats:
    """Return d(log fid_fp) / d(theta): [T, parameters]."""
    _, b, gamma, c = _head(theta)
    rows = np.arange(len(design.log_error))
    terms = np.exp(_log_terms(design, theta))[rows, choices]  # [T, L]
    total = c + terms.sum(axis=1, keepdims=True)
    part = b * terms / total
    split = [part * (choices == option) for option in range(len(design.option))]
    by_option = np.stack([share.sum(axis=1) for share in split], axis=1)
    by_pair = np.stack([share @ design.kind for share in split], axis=2)  # [T, types, O]
    (_, sd_a), (_, sd_b), (_, sd_gamma), (_, sd_c) = HEAD_PRIOR
    head = [
        np.full(len(choices), sd_a),
        sd_b * b * np.log(total[:, 0]),
        sd_gamma * gamma * (part * design.log_error[rows, choices]).sum(axis=1),
        sd_c * b * c / total[:, 0],
    ]
    body = [part @ design.layer, by_option @ design.option, by_pair.reshape(len(choices), -1)]
    return np.concatenate([np.stack(head, axis=1), *body], axis=1)


def _solve(design: _Design, choices: Ints, target: Floats, weights: Floats, strength: float) -> Floats:
    """Minimise sum_t weight · (log fid_fp - target)^2 / NOISE_SD^2 + strength · |theta|^2 by Gauss-Newton.

    Each step is solved in the dual (trials x trials), because parameters outnumber trials; a step that does not
    descend is halved.
    """
    root = np.sqrt(weights) / NOISE_SD
    theta = np.zeros(4 + design.layer.shape[1] + design.option.shape[1] + design.kind.shape[1] * len(design.option))
    theta[0] = (np.average(target, weights=weights) - HEAD_PRIOR[0][0]) / HEAD_PRIOR[0][1]

    def loss(candidate: Floats) -> tuple[float, Floats]:
        residual = root * (_predict(design, candidate, choices) - target)
        return float(residual @ residual + strength * candidate @ candidate), residual

    value, residual = loss(theta)
    for _ in range(100):
        jacobian = root[:, None] * _jacobian(design, theta, choices)
        kernel = jacobian @ jacobian.T + strength * np.eye(len(residual))
        step = -jacobian.T @ np.linalg.solve(kernel, residual - jacobian @ theta) - theta
        size = 1.0
        while size > 1e-4:
            trial_value, trial_residual = loss(theta + size * step)
            if trial_value < value:
                break
            size /= 2
        else:
            break
        done = value - trial_value < 1e-8 * value
        theta, value, residual = theta + size * step, trial_value, trial_residual
        if done:
            break
    return theta


def _ridge(x: Floats, y: Floats, weights: Floats, strength: float) -> Floats:
    """Return slopes per unit of x and the intercept [F + 1]; columns are standardised, solved in the dual."""
    mean, offset = np.average(x, axis=0, weights=weights), np.average(y, weights=weights)
    spread = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weights))
    scale = np.where(spread > 1e-9 * (np.abs(mean) + 1e-30), spread, np.inf)  # a constant column has no slope
    root = np.sqrt(weights)
    z = root[:, None] * (x - mean) / scale
    slopes = z.T @ np.linalg.solve(z @ z.T + strength * np.eye(len(y)), root * (y - offset)) / scale
    return np.append(slopes, offset - mean @ slopes)
