"""The additive surrogate: a sum over layers predicts, so the knapsack on its terms is the exact optimum."""

import numpy as np

from quantdm.surrogates.additive_model import (
    ADDITIVE_VERSION,
    AdditiveCurve,
    Floats,
    Ints,
    linear_terms,
    make_design,
    straight_line,
)
from quantdm.surrogates.curve_surrogate import CurveSurrogate
from quantdm.surrogates.space import SearchSpace


class AdditiveSurrogate(CurveSurrogate):
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
    version = ADDITIVE_VERSION
    strengths = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

    def __init__(self, space: SearchSpace, *, random_state: int = 0) -> None:
        super().__init__(space, random_state=random_state)
        self._design = make_design(space)

    @property
    def curve(self) -> AdditiveCurve:
        """The additive model."""
        return AdditiveCurve(self._design)

    def fold_values(self) -> Floats:
        """Return the terms of the sum in units of y at the median trial, for the final fit and each fold: [1+K, L, O].

        dy = -b / (c + S) · dS: one factor for all cells, so the ranking of configurations is the model's own.
        """
        pairs = zip(self.thetas, self.references, strict=True)
        return np.stack([linear_terms(self._design, theta, reference) for theta, reference in pairs])

    def split_difference(self, choice: Ints, reference: Ints) -> Floats:
        """Return the layers' shares of y(choice) - y(reference), for the final fit and each fold: [1+K, L]."""
        return np.stack([straight_line(self._design, theta, choice, reference) for theta in self.thetas])
