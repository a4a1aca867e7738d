"""The additive model: positive learned weights on one-layer noise errors, and how its curve bends."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantdm.schemes import Scheme
from quantdm.surrogates.features import band_index, type_index
from quantdm.surrogates.local import log_rate
from quantdm.surrogates.space import SearchSpace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
FOLDS, MIN_TRIALS = 5, 10
WHY = "five folds need at least two held-out trials each"
ADDITIVE_VERSION = 4
# Standard deviations, in log units, by which the parts of a layer's weight may differ before the data speak. Chosen on
# 160 trials of each reference pipeline: without "pair" the rank correlation near the budget falls by 0.015 to 0.02.
PRIOR = {"type": 0.6, "band": 0.4, "cell": 0.3, "layer": 0.5, "method": 0.4, "width": 0.4, "option": 0.2, "pair": 0.4}
HEAD_PRIOR = ((0.0, 10.0), (0.0, 0.5), (0.0, 0.25), (-3.0, 1.0))  # mean and sd of a, log b, log gamma, log c


@dataclass(frozen=True, eq=False)
class Design:
    """The fixed part of the model: log errors [L, O] and the columns of the log weights of layers and options."""

    log_error: Floats
    layer: Floats  # [L, P]
    option: Floats  # [O, Q]
    kind: Floats  # [L, types], one-hot: the effects of (operation type, option) pairs
    parts: dict[str, slice]  # where the columns of `option` lie: method, width, option


def method_name(option: Scheme) -> str:
    """Return what the method of an option is called: options of one name share a column of the design."""
    kind = f"method {option.method} {option.granularity} {option.group_size}"
    more = [" hadamard"] * option.hadamard + [f" equalised-{option.equalised}"] * (option.equalised is not None)
    return kind + "".join(more) + (f" lowrank-{option.lowrank}" if option.lowrank else "")


def make_design(space: SearchSpace, *, kinds: Sequence[str] | None = None) -> Design:
    """Build the columns, each scaled by the prior standard deviation of its effect.

    Args:
        space: sizes and errors.
        kinds: what every layer counts as [L] (None: its operation type).
    """
    _, type_of = type_index(space)
    if kinds is not None:
        names = list(dict.fromkeys(kinds))
        type_of = np.array([names.index(kind) for kind in kinds], dtype=np.int64)
    band_of = band_index(space)
    cells = np.unique(type_of * (band_of.max() + 1) + band_of, return_inverse=True)[1]
    methods = [method_name(option) for option in space.options]
    method_of = np.array([methods.index(method) for method in methods])
    width_of = np.unique([option.bits for option in space.options], return_inverse=True)[1]
    layer = {"type": type_of, "band": band_of, "cell": cells, "layer": np.arange(len(type_of))}
    option = {"method": method_of, "width": width_of, "option": np.arange(len(methods))}
    error = np.maximum(space.felt_error, 1e-9 * space.noise_error.max())
    # unit: the typical size of S, so that c and the prior mean of every log weight mean the same in every model
    log_error = np.log(error) - np.log(error.mean(axis=1).sum())
    ends = np.cumsum([0, *(part.max() + 1 for part in option.values())])
    parts = {name: slice(int(a), int(b)) for name, a, b in zip(option, ends, ends[1:], strict=False)}
    kind = PRIOR["pair"] * np.eye(type_of.max() + 1)[type_of]
    return Design(log_error, _columns(layer), _columns(option), kind, parts)


def _columns(parts: dict[str, Ints]) -> Floats:
    return np.concatenate([PRIOR[name] * np.eye(part.max() + 1)[part] for name, part in parts.items()], axis=1)


def body_size(design: Design) -> int:
    """Return the number of parameters of the head and of the terms."""
    return 4 + design.layer.shape[1] + design.option.shape[1] + design.kind.shape[1] * design.option.shape[0]


def start_of(size: int, mean: float) -> Floats:
    """Return parameters at the prior's mode, but for a = `mean`."""
    theta = np.zeros(size)
    theta[0] = (mean - HEAD_PRIOR[0][0]) / HEAD_PRIOR[0][1]
    return theta


def head_of(theta: Floats) -> tuple[float, float, float, float]:
    a, log_b, log_gamma, log_c = (mean + sd * t for (mean, sd), t in zip(HEAD_PRIOR, theta[:4], strict=True))
    return a, float(np.exp(log_b)), float(np.exp(log_gamma)), float(np.exp(log_c))


def log_terms(design: Design, theta: Floats) -> Floats:
    """Return log(w[l] · v[o] · u[type, o] · e[l, o]^gamma) [L, O]."""
    parts = np.split(theta[4 : body_size(design)], np.cumsum([design.layer.shape[1], design.option.shape[1]]))
    log_w, log_v = design.layer @ parts[0], design.option @ parts[1]
    log_u = design.kind @ parts[2].reshape(design.kind.shape[1], -1)
    return log_w[:, None] + log_v[None] + log_u + head_of(theta)[2] * design.log_error


def predict_log_fid(design: Design, theta: Floats, choices: Ints) -> Floats:
    """Return log fid_fp = a + b · log(c + S): [T, L] -> [T]."""
    a, b, _, c = head_of(theta)
    terms = np.exp(log_terms(design, theta))
    return a + b * np.log(c + terms[np.arange(len(terms)), choices].sum(axis=1))


def linear_terms(design: Design, theta: Floats, reference: Ints) -> Floats:
    """Return the change of y per change of S at the choice `reference` [L], times the terms of S: [L, O]."""
    _, b, _, c = head_of(theta)
    terms = np.exp(log_terms(design, theta))
    return -b / (c + terms[np.arange(len(terms)), reference].sum()) * terms


def straight_line(design: Design, theta: Floats, choice: Ints, reference: Ints) -> Floats:
    """Return every layer's share of y(choice) - y(reference) along a straight line of S (Aumann, Shapley 1974): [L]."""
    _, b, _, c = head_of(theta)
    terms = np.exp(log_terms(design, theta))[np.arange(len(choice)), np.stack([choice, reference])]
    own, other = c + terms.sum(axis=1)
    return log_rate(b, float(own), float(other)) * (terms[0] - terms[1])


def median_trial(choices: Ints, labels: Floats) -> Ints:
    """Return the choice whose label is the median: [T, L] -> [L]."""
    return choices[np.argsort(labels)[len(labels) // 2]]


def body_jacobian(design: Design, theta: Floats, choices: Ints, part: Floats, total: Floats) -> Floats:
    """Return d(log fid_fp) / d(head and terms): [T, parameters].

    Args:
        design: the fixed part.
        theta: where.
        choices: [T, L].
        part: d(log fid_fp) / d(log term) of every layer's chosen cell [T, L].
        total: c + S [T].
    """
    _, b, gamma, c = head_of(theta)
    split = [part * (choices == option) for option in range(len(design.option))]
    by_option = np.stack([share.sum(axis=1) for share in split], axis=1)
    by_pair = np.stack([share @ design.kind for share in split], axis=2)  # [T, types, O]
    (_, sd_a), (_, sd_b), (_, sd_gamma), (_, sd_c) = HEAD_PRIOR
    head = [
        np.full(len(choices), sd_a),
        sd_b * b * np.log(total),
        sd_gamma * gamma * (part * design.log_error[np.arange(len(design.log_error)), choices]).sum(axis=1),
        sd_c * b * c / total,
    ]
    body = [part @ design.layer, by_option @ design.option, by_pair.reshape(len(choices), -1)]
    return np.concatenate([np.stack(head, axis=1), *body], axis=1)


@dataclass(frozen=True)
class AdditiveCurve:
    """The additive model as `quantdm.surrogates.gauss_newton` fits it."""

    design: Design

    def start(self, mean: float) -> Floats:
        """Return the parameters at which the prior's mode predicts about `mean`."""
        return start_of(body_size(self.design), mean)

    def log_fid(self, theta: Floats, choices: Ints) -> Floats:
        """Return log fid_fp: [T, L] -> [T]."""
        return predict_log_fid(self.design, theta, choices)

    def jacobian(self, theta: Floats, choices: Ints) -> Floats:
        """Return d(log fid_fp) / d(theta): [T, parameters]."""
        _, b, _, c = head_of(theta)
        terms = np.exp(log_terms(self.design, theta))[np.arange(len(self.design.log_error)), choices]
        total = c + terms.sum(axis=1)
        return body_jacobian(self.design, theta, choices, b * terms / total[:, None], total)
