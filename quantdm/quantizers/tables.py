"""Tables: the nearest entry of a sorted table for every weight, and back from codes to values by gathering."""

import torch
from torch import Tensor

from quantdm.quantizers.rows import block_pieces, piece_budget, pieces

COMPARE_UP_TO = 32  # entries; counting comparisons beats a binary search below this
# Where the largest entry of an int8 codebook may come to lie. The entries of a row are few, so some step rounds them
# all better than 1/127 of the largest: the best of these takes off a third of the rounding error of 16 entries.
TOPS = tuple(127 - 0.5 * j for j in range(32))


def round_codebook(codebook: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Round ascending codebooks [R, k] to int8 [R, k] times an fp16 scale [R].

    The scale is the one of TOPS with the least squared error over the `counts` [R, k] weights of the entries.
    |codebook| stays below 2^15.
    """
    top = codebook.abs().amax(dim=1, keepdim=True)
    best, weight = torch.full_like(top, torch.inf), counts.float()
    scale = torch.zeros_like(top)
    for place in TOPS:
        step = (top / place).half().float().clamp_min(2.0**-24)  # the least positive fp16
        rounded = (codebook / step).round_().clamp_(-127, 127).mul_(step)
        error = (rounded.sub_(codebook).square_() * weight).sum(dim=1, keepdim=True)
        better = error < best
        scale, best = torch.where(better, step, scale), torch.where(better, error, best)
    return (codebook / scale).round_().clamp_(-127, 127).to(torch.int8), scale[:, 0].half()


def nearest_codes(rows: Tensor, table: Tensor) -> Tensor:
    """Return the uint8 codes [R, n] of the entries of the ascending `table` [R, k] nearest to `rows` [R, n]."""
    middle = (table[:, 1:] + table[:, :-1]) / 2
    if table.shape[1] > COMPARE_UP_TO:
        codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
        for lines, columns in pieces(rows.shape[0], rows.shape[1], piece_budget(rows.device)):
            codes[lines, columns] = torch.searchsorted(middle[lines], rows[lines, columns], out_int32=True)
        return codes
    # A weight's code is the number of middles below it.
    codes = torch.zeros(rows.shape, dtype=torch.uint8, device=rows.device)
    for lines, columns in pieces(rows.shape[0], rows.shape[1], piece_budget(rows.device)):
        piece, count = rows[lines, columns], codes[lines, columns]
        above = torch.empty(piece.shape, dtype=torch.bool, device=rows.device)
        for j in range(middle.shape[1]):
            torch.gt(piece, middle[lines, j, None], out=above)
            count += above.view(torch.uint8)
    return codes


def gather_(out: Tensor, codes: Tensor, table: Tensor) -> None:
    """Write the table's values for `codes` [lines, groups, length] into `out`; `table` is [lines, groups, k].

    The table is cast to the dtype of `out` first: the same values as a cast after the gather, at half the traffic.
    """
    lines, groups, k = table.shape
    values = table.to(out.dtype).reshape(-1)
    first = torch.arange(0, lines * groups * k, k, dtype=torch.int32, device=table.device).view(lines, groups)
    found = torch.empty(0, dtype=out.dtype, device=out.device)
    for index in block_pieces(codes.shape, piece_budget(codes.device, cpu=2**16)):
        source = codes[index]
        positions = source + first[(*index[:2], None)]  # int32: index_select takes it as it is, gather would need int64
        found = found if found.numel() == source.numel() else found.new_empty(source.numel())
        torch.index_select(values, 0, positions.view(-1), out=found)
        out[index] = found.view(source.shape)
