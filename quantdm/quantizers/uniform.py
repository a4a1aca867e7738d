"""Uniform quantization: affine (UAQ) with an integer zero point, or symmetric; the range is searched.

For alpha in {1, .9, ..., .1}: Delta = alpha(max - min)/(2^b - 1), z = round(-alpha·min/Delta),
q = clip(round(w/Delta) + z, 0, 2^b - 1), w_hat = (q - z)·Delta; the alpha that minimises mean|w - w_hat|^2.4 is kept
(Qua2SeDiMo, arXiv 2412.14628, section 3; PTQ4DM and Q-Diffusion use the same search). Delta is rounded to the stored
fp16 before anything else is computed, so the error that is searched is the error that is kept.

Symmetric: z = 2^(b-1) for every row, and Delta = +-alpha·max|w| / 2^(b-1). The grid reaches one step further at its
lower end; the sign of Delta, searched too, says which end of the row that is.
"""

import torch
from torch import Tensor

from quantdm.quantizers.rows import block_pieces, piece_budget, pieces
from quantdm.schemes import ERROR_POWER

ALPHAS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
MAX_ZERO = 2**14  # |z| stays below 2^15 and a constant row of fp16 numbers stays exact
MIN_SCALE = 2.0**-24  # the least positive fp16


def candidate_grids(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the fp16-rounded steps Delta and zero points z of every alpha, as float32 [10, R].

    `low` and `high` [R] are the extremes of the rows. Rows whose range is narrow beside their distance from zero take
    the least step whose zero point still fits int16: (q - z)·Delta is then within max|row|/2^15 of every weight.
    """
    alpha = torch.tensor(ALPHAS, device=low.device)[:, None]
    least = torch.maximum(high, -low) / MAX_ZERO
    step = torch.maximum(alpha * (high - low) / (2**bits - 1), least).clamp_min(MIN_SCALE)
    step = step.half().float()
    return step, torch.round(-alpha * low / step)


def search_range(
    rows: Tensor, bits: int, *, importance: Tensor | None = None, p: float = ERROR_POWER
) -> tuple[Tensor, Tensor]:
    """Search the range of every row [R, n] on mean|w - w_hat|^p, every weight counted `importance` [R, n] times.

    Returns the scale fp16 [R] and the zero point int16 [R].
    """
    low, high = rows.aminmax(dim=1)
    step, zero = candidate_grids(low, high, bits)
    error = torch.zeros(step.shape, dtype=torch.float64, device=rows.device)
    for lines, columns in pieces(rows.shape[0], rows.shape[1], piece_budget(rows.device)):
        piece = rows[lines, columns]
        weight = None if importance is None else importance[lines, columns]
        scaled, grid = torch.empty_like(piece), torch.empty_like(piece)
        for a in range(len(ALPHAS)):
            z = zero[a, lines, None]
            torch.div(piece, step[a, lines, None], out=scaled)
            torch.round(scaled, out=grid).clamp_(-z, 2**bits - 1 - z)
            error[a, lines] += power_sum(grid.sub_(scaled), p, weight)
    error *= step.double() ** p  # the errors above are in units of the step
    best = error.argmin(dim=0, keepdim=True)
    return step.gather(0, best)[0].half(), zero.gather(0, best)[0].to(torch.int16)


def search_symmetric(rows: Tensor, bits: int, *, importance: Tensor | None = None, p: float = ERROR_POWER) -> Tensor:
    """Search the signed scale fp16 [R] of the symmetric grid of every row [R, n], as `search_range` does."""
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))[:, 0]
    alpha = torch.tensor((*ALPHAS, *(-a for a in ALPHAS)), device=rows.device)[:, None]
    step = -alpha * largest / 2 ** (bits - 1)
    step = torch.where(step.abs() < MIN_SCALE, MIN_SCALE, step).half().float()
    error = torch.zeros(step.shape, dtype=torch.float64, device=rows.device)
    for lines, columns in pieces(rows.shape[0], rows.shape[1], piece_budget(rows.device)):
        piece = rows[lines, columns]
        weight = None if importance is None else importance[lines, columns]
        for a in range(len(step)):
            scaled = piece / step[a, lines, None]
            grid = scaled.round().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            error[a, lines] += power_sum(grid.sub_(scaled), p, weight)
    error *= step.abs().double() ** p
    return step.gather(0, error.argmin(dim=0, keepdim=True))[0].half()


def encode(rows: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return the uint8 codes [R, n] of rows [R, n] under the stored scale [R] and zero point [R]."""
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    step, zero = scale.float(), zero_point.float()
    for lines, columns in pieces(rows.shape[0], rows.shape[1], piece_budget(rows.device)):
        grid = torch.div(rows[lines, columns], step[lines, None]).round_()
        codes[lines, columns] = grid.add_(zero[lines, None]).clamp_(0, 2**bits - 1)
    return codes


def decode_(out: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, limit: float) -> None:
    """Write (codes - zero_point)·scale into `out` [lines, groups, length], computed in float32.

    `scale` is float32 with the factor already in it; values beyond +-limit are saturated.
    """
    zero = zero_point.float()
    reach = torch.maximum(zero.abs(), (2**bits - 1 - zero).abs()).mul_(scale.abs())
    # Needed only when a weight is at the edge of its dtype; on a GPU asking would cost more than doing it.
    saturate = codes.is_cuda or not bool((reach <= limit).all())
    buffer = torch.empty(0, device=codes.device)
    for index in block_pieces(codes.shape, piece_budget(codes.device, cpu=2**16)):
        source, params = codes[index], (*index[:2], None)
        buffer = buffer if buffer.shape == source.shape else torch.empty(source.shape, device=codes.device)
        torch.sub(source, zero[params], out=buffer).mul_(scale[params])
        out[index] = buffer.clamp_(-limit, limit) if saturate else buffer


def power_sum(difference: Tensor, p: float = ERROR_POWER, weight: Tensor | None = None) -> Tensor:
    """Return sum |d|^p over the last axis, weighted when asked; overwrites its first argument.

    exp(p/2·log(d^2)) is six times faster than `pow`, and zero stays zero: exp(-inf) = 0.
    """
    power = difference.square_()
    if p != 2:
        power = power.log_().mul_(p / 2).exp_()
    return (power if weight is None else power.mul_(weight)).sum(dim=-1).double()
