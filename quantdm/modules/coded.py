"""An input as the integers that stand for it, in place of its rounded values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantdm.quantizers.equaliser import shifted
from quantdm.quantizers.hadamard import rotate


@dataclass(frozen=True, eq=False)
class Codes:
    """Integers and what they mean: x_hat = scale·(codes + zero).

    `codes` are uint8 and have the shape of the input, those of a convolution [B, C, H, W] in channels-last memory;
    `scale` and `zero` (float32, whole numbers in `zero`) have as many dimensions, of length one where they are shared.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def values(self) -> Tensor:
        """Return x_hat in float32."""
        return (self.codes.float() + self.zero) * self.scale


@dataclass(frozen=True, eq=False)
class CodedInput:
    """The input of a packed layer that multiplies integers: one part, or the two halves of a concatenated long skip.

    A pre-hook hands it over in place of a tensor; `dtype` is the one of that tensor, and of the layer's output.
    """

    parts: tuple[Codes, ...]
    dtype: torch.dtype
    channel: int  # the dimension along which the halves lie behind each other
    rotated: bool = False  # whether channels were rotated before; the weight's integers are those of a rotated one then
    exponents: Tensor | None = None  # of the powers of two that channels were divided by, which are in the weight then

    def values(self) -> Tensor:
        """Return the rounded input, as a simulation computes it."""
        values = [part.values() for part in self.parts]
        values = [rotate(part, self.channel) for part in values] if self.rotated else values
        whole = torch.cat(values, dim=self.channel)
        if self.exponents is not None:
            whole = shifted(whole, self.exponents, self.channel, 1)
        return whole.to(self.dtype)
