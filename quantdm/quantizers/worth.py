"""Schemes whose tables and scales cost more bits than the codes save."""

import math
from collections.abc import Sequence

from quantdm.quantizers.branches import fits_rank
from quantdm.quantizers.weight import count_bits
from quantdm.schemes import ORIGINAL_BITS, Scheme


def bits_of(shape: Sequence[int], scheme: Scheme, split: int | None = None) -> float:
    """Return the bits per weight that a scheme really takes for a weight of this shape, overhead included."""
    return count_bits(shape, scheme, split) / math.prod(shape)


def is_wasteful(shape: Sequence[int], scheme: Scheme, split: int | None = None) -> bool:
    """Whether what is stored beside the codes takes more bits than all of it saves against ORIGINAL_BITS a weight.

    So it is for a codebook of 256 entries on rows of 256 weights: 15.7 bits instead of 8 save .3 and cost 7.7. A branch
    of a higher rank than the weight has counts as wasteful, too.
    """
    if not fits_rank(shape, scheme):
        return True
    bits = bits_of(shape, scheme, split)
    return bits - scheme.bits > ORIGINAL_BITS - bits
