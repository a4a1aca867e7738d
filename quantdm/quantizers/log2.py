"""Log2 quantization: sign times a power of two, so that hardware multiplies by shifting.

The grid has 2^b entries: scale·{-2^0 .. -2^-(E-2), 0, 2^-(E-1) .. 2^0} with E = 2^(b-1), in ascending order of code.
Zero takes the place of the negative entry nearest to it: on Gaussian, Laplace and Student-t(4) rows this has 9 to 29 %
less error at 2 bits than E entries for each sign, up to 11 % less at 3 bits, and not more at any width. The scale is
alpha·max|w| with the alpha of {1, .9, ..., .1} that minimises mean|w - w_hat|^2.4, rounded to fp16 before the search.
Steps between entries stay a factor of two, so beyond 4 bits the error hardly falls. With half steps they are a factor
of sqrt(2): the exponents are halves, and the grid ends earlier.
"""

import torch
from torch import Tensor

from quantdm.quantizers.rows import piece_budget, pieces
from quantdm.quantizers.tables import nearest_codes
from quantdm.quantizers.uniform import ALPHAS, ERROR_POWER, MIN_SCALE, power_sum


def grid(bits: int, *, half_steps: bool = False) -> Tensor:
    """Return the 2^bits entries of the grid for scale 1, ascending, float32."""
    E = 2 ** (bits - 1)
    positive = torch.exp2(-torch.arange(E, dtype=torch.float32) / (2 if half_steps else 1))
    return torch.cat([-positive[: E - 1], torch.zeros(1), positive.flip(0)])


def search_scale(
    rows: Tensor, bits: int, *, half_steps: bool = False, importance: Tensor | None = None, p: float = ERROR_POWER
) -> Tensor:
    """Search the scale of every row [R, n] on mean|w - w_hat|^p, every weight counted `importance` [R, n] times.

    Returns fp16 [R].
    """
    alpha = torch.tensor(ALPHAS, device=rows.device)[:, None]
    scale = (alpha * rows.abs().amax(dim=1)).clamp_min(MIN_SCALE).half().float()
    error = torch.zeros(scale.shape, dtype=torch.float64, device=rows.device)
    entries = grid(bits, half_steps=True).to(rows.device) if half_steps else None
    for lines, columns in pieces(rows.shape[0], rows.shape[1], piece_budget(rows.device)):
        piece = rows[lines, columns]
        weight = None if importance is None else importance[lines, columns]
        for a in range(len(ALPHAS)):
            scaled = piece / scale[a, lines, None]
            if entries is None:
                rounded = _round_to_grid(scaled, bits)
            else:
                rounded = entries[nearest_codes(scaled.view(1, -1), entries[None]).long()].view(scaled.shape)
            error[a, lines] += power_sum(rounded.sub_(scaled), p, weight)
    error *= scale.double() ** p
    return scale.gather(0, error.argmin(dim=0, keepdim=True))[0].half()


def _round_to_grid(scaled: Tensor, bits: int) -> Tensor:
    """Return the nearest entry of the grid. [.75·2^e, 1.5·2^e) rounds to 2^e: scaled by 4/3, that is its exponent."""
    E = 2 ** (bits - 1)
    least = torch.where(scaled < 0, 2.0 ** -(E - 2), 2.0 ** -(E - 1))
    power = ((scaled.abs() * (4 / 3)).view(torch.int32) & 0x7F800000).view(torch.float32)  # clears the mantissa
    power = torch.minimum(torch.maximum(power, least), power.new_ones(()))
    return torch.where(scaled.abs() < least / 2, 0.0, power.copysign_(scaled))
