"""The coordinates of the input channels in which a scheme quantizes a weight: as they are, rotated, or equalised."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from quantdm.quantizers.equaliser import equalise_moments, exponents_from_moments, shifted
from quantdm.quantizers.hadamard import rotate, rotate_moments
from quantdm.quantizers.moments import Moments
from quantdm.schemes import Scheme


@dataclass(frozen=True, eq=False)
class Turning:
    """How weights of one layer come into a scheme's coordinates, and the moments there; `stored` turns them back."""

    scheme: Scheme
    split: int | None
    moments: Moments | None
    stored: dict[str, Tensor]

    @classmethod
    def of(cls, weight: Tensor, scheme: Scheme, split: int | None, moments: Moments | None) -> "Turning":
        """Return the coordinates of a scheme for a weight whose inputs have these moments."""
        if scheme.hadamard:
            seen = None if moments is None else rotate_moments(moments, weight.shape[1], seam=split)
            return cls(scheme, split, seen, {})
        if scheme.equalised is None or moments is None:
            return cls(scheme, split, moments, {})
        exponents = exponents_from_moments(moments, weight, scheme.equalised / 100)
        seen = equalise_moments(moments, exponents.to(moments.second.device))
        return cls(scheme, split, seen, {"exponents": exponents})

    def turn(self, weight: Tensor) -> Tensor:
        """Return a weight in these coordinates."""
        if self.scheme.hadamard:
            return rotate(weight, 1, seam=self.split)
        return shifted(weight, self.stored["exponents"], 1, 1) if self.stored else weight


def turned_back(dense: Tensor, scheme: Scheme, tensors: Mapping[str, Tensor], split: int | None) -> Tensor:
    """Return a decoded weight in the coordinates of its layer."""
    if scheme.hadamard:  # a rotation is its own inverse
        return rotate(dense, 1, seam=split)
    return dense if scheme.equalised is None else shifted(dense, tensors["exponents"], 1, -1)
