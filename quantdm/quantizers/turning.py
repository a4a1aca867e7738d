"""The coordinates of the input channels in which a scheme quantizes a weight: as they are, rotated, or equalised."""

from collections.abc import Mapping

from torch import Tensor

from quantdm.quantizers.equaliser import equalise_moments, exponents_from_moments, shifted
from quantdm.quantizers.hadamard import rotate, rotate_moments
from quantdm.quantizers.moments import Moments
from quantdm.schemes import Scheme


def turned(
    weight: Tensor, scheme: Scheme, split: int | None, moments: Moments | None
) -> tuple[Tensor, Moments | None, dict[str, Tensor]]:
    """Return weight and moments in a scheme's coordinates, and what is stored to turn the weight back."""
    if scheme.hadamard:
        seen = None if moments is None else rotate_moments(moments, weight.shape[1], seam=split)
        return rotate(weight, 1, seam=split), seen, {}
    if scheme.equalised is None or moments is None:
        return weight, moments, {}
    exponents = exponents_from_moments(moments, weight, scheme.equalised / 100)
    moments = equalise_moments(moments, exponents.to(moments.second.device))
    return shifted(weight, exponents, 1, 1), moments, {"exponents": exponents}


def turned_back(dense: Tensor, scheme: Scheme, tensors: Mapping[str, Tensor], split: int | None) -> Tensor:
    """Return a decoded weight in the coordinates of its layer."""
    if scheme.hadamard:  # a rotation is its own inverse
        return rotate(dense, 1, seam=split)
    return dense if scheme.equalised is None else shifted(dense, tensors["exponents"], 1, -1)
