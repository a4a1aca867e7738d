"""The graph surrogate: amplitudes of errors that meet along the data flow (docs/method.md, Surrogates)."""

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantdm.surrogates.additive_model import body_size, head_of
from quantdm.surrogates.amplitudes import AmplitudeNet, make_net
from quantdm.surrogates.block_scores import layer_values
from quantdm.surrogates.curve_surrogate import CurveSurrogate
from quantdm.surrogates.meeting import secants, shapley
from quantdm.surrogates.space import SearchSpace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
GRAPH_VERSION = 5
BACKGROUND = 64  # trials around which values of single layers are looked at


class GraphSurrogate(CurveSurrogate):
    """Rank configurations by amplitudes of errors that meet inside blocks (`quantdm.surrogates.amplitudes`).

    log fid_fp = a + b · log(c + S), where S is exactly additive over the roots of blocks; so what predicts is what is
    explained, and the whole-block knapsack on S is the exact optimum of the prediction. Before it learns it is the
    plain one-layer sensitivity, and without interactions it is the additive surrogate. All parameters are drawn to
    their prior by a common strength, those of messages by a tighter one where that predicts better; both are chosen by
    the held-out error, and every fold chooses its own inside its training trials. The final network is fitted to all
    trials; those of the folds tell how sure it is.
    """

    name = "graph"
    version = GRAPH_VERSION
    strengths = (0.3, 1.0, 3.0, 10.0, 30.0)
    looseness = (1.0, 0.1)  # of the messages: with hardly any it is nearly the additive surrogate

    def __init__(self, space: SearchSpace, *, random_state: int = 0) -> None:
        super().__init__(space, random_state=random_state)
        self.net = make_net(space)
        self._background: Ints | None = None  # [N, L] of the better half of the trials: there the answer lies

    @property
    def curve(self) -> AmplitudeNet:
        """The network."""
        return self.net

    def scale_of(self, looseness: float) -> Floats:
        """Return 1 for the terms and `looseness` for what is said of messages [P]."""
        scale = super().scale_of(looseness)
        scale[body_size(self.net.design) :] = looseness
        return scale

    def fit(self, choices: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Fit as `CurveSurrogate.fit`, and remember trials around which to look at single layers."""
        super().fit(choices, y, sample_weight)
        self._background = _better_half(self.space.check(choices), np.asarray(y, dtype=np.float64))
        return self

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
        found = []
        for theta, reference in zip(self.thetas, self.references, strict=True):
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
    def background(self) -> Ints:
        """Trials around which values of single layers are looked at: [N, L]."""
        assert self._background is not None
        return self._background

    def to_dict(self) -> dict[str, Any]:
        """Return the fitted surrogate as a JSON record with a version."""
        return super().to_dict() | {"background": self.background.tolist()}

    @classmethod
    def from_dict(cls, record: dict[str, Any], space: SearchSpace) -> Self:
        """Build a surrogate from `to_dict`'s record; its space must be `space`."""
        self = super().from_dict(record, space)
        self._background = np.array(record["background"])
        return self


def _better_half(choices: Ints, labels: Floats) -> Ints:
    """Return at most 64 trials, spread evenly over the ranks of the better half."""
    better = np.argsort(-labels)[: max(1, len(labels) // 2)]
    return choices[better[np.unique(np.linspace(0, len(better) - 1, BACKGROUND).astype(np.int64))]]
