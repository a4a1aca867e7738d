"""Why is this configuration better or worse than that one? Shares of layers that sum to the predicted difference.

Every surrogate splits its own difference exactly (`split_difference`): linear models by their terms, the additive
surrogate along a straight line of its cost (Aumann and Shapley 1974), trees by interventional TreeSHAP with the other
configuration as background, the graph surrogate by exact Shapley values inside blocks (docs/method.md, Explanation).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantdm.errors import QuantDMError
from quantdm.surrogates.space import SearchSpace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
LOCAL_VERSION = 1


class Splitting(Protocol):
    """A fitted surrogate that splits the difference of two predictions over layers."""

    name: str
    space: SearchSpace

    def predict(self, choices: ArrayLike) -> Floats:
        """Predict y: [T, L] -> [T]."""
        ...

    def split_difference(self, choice: Ints, reference: Ints) -> Floats:
        """Return contributions of layers for the final model and each fold: [L], [L] -> [1+K, L]."""
        ...


@dataclass(frozen=True, eq=False)
class LocalExplanation:
    """Why `choice` is predicted to be better (+) or worse (-) than `reference`, both [L].

    `contributions` [L] are in units of y, larger is better; they sum to predicted - base, change their sign when the
    two configurations are swapped, and are 0 where both take the same option. `spread` [L] is their standard deviation
    over folds.
    """

    source: str
    space: SearchSpace
    choice: Ints
    reference: Ints
    base: float  # predicted y of the reference
    predicted: float  # of the choice
    contributions: Floats
    spread: Floats

    @property
    def difference(self) -> float:
        """Predicted y of the choice less that of the reference."""
        return self.predicted - self.base

    def ranked(self, top: int | None = None) -> Ints:
        """Return the layers that contribute, largest contribution of either sign first, at most `top` of them."""
        order = np.argsort(-np.abs(self.contributions), kind="stable")
        return order[self.contributions[order] != 0][:top]

    def share(self, layers: Ints) -> float:
        """Return how much of all that changed those layers are: sum |c| over them / sum |c|; 1 if nothing changed."""
        whole = float(np.abs(self.contributions).sum())
        return float(np.abs(self.contributions[layers]).sum()) / whole if whole > 0 else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the explanation as a JSON record with a version."""
        labels, names = self.space.labels, self.space.layer_names
        return {
            "version": LOCAL_VERSION,
            "source": self.source,
            "base": self.base,
            "predicted": self.predicted,
            "layers": [
                {
                    "layer": names[position],
                    "option": labels[self.choice[position]],
                    "reference": labels[self.reference[position]],
                    "contribution": float(self.contributions[position]),
                    "spread": float(self.spread[position]),
                }
                for position in self.ranked()
            ],
        }


def explain_one(surrogate: Splitting, choice: ArrayLike, reference: ArrayLike) -> LocalExplanation:
    """Explain the predicted difference of one configuration [L] to another [L] by contributions of layers.

    Raises:
        QuantDMError: the surrogate is not fitted, or the configurations are not of its space or not one each.
    """
    rows = [surrogate.space.check(given) for given in (choice, reference)]
    if any(len(row) != 1 for row in rows):
        raise QuantDMError(f"explain_one: got {len(rows[0])} and {len(rows[1])} configurations, expected one of each")
    own, other = rows[0][0], rows[1][0]
    base, predicted = surrogate.predict(np.stack([other, own]))
    folds = surrogate.split_difference(own, other)
    return LocalExplanation(
        surrogate.name, surrogate.space, own, other, float(base), float(predicted), folds[0], folds[1:].std(axis=0)
    )


def log_rate(b: float, total: float, other: float) -> float:
    """Return the change of -b · log(total) per change of total between two totals: a secant, or the slope if equal."""
    if abs(total - other) <= 1e-9 * total:
        return -2 * b / (total + other)
    return -b * (np.log(total) - np.log(other)) / (total - other)
