"""One learned table for the whole tensor, with a scale per channel or per group: what NF4 is, with everything fitted.

w_hat = scale·table[code]. Scales carry a sign, so that the table may be lopsided: the largest weight of every group
lies at its upper end, and the lower end need not reach as far. Table, scales and codes are improved in turn, each with
the others held: the table by weighted k-means of w/scale, the scale by trying SHARES of the largest weight in both
directions (once a table is there: what lies NEAR) and then by least squares, the codes by rounding. Scales of groups
are stored in 8 bits, as multiples of one fp16 step per CHUNK of them (double quantization; Dettmers et al., 2023),
those of channels in fp16.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantdm.quantizers import kmeans
from quantdm.quantizers.rows import piece_budget, pieces
from quantdm.quantizers.sorted_rows import SortedRows
from quantdm.quantizers.tables import nearest_codes

CHUNK = 256  # scales that share a step
TOP = 127  # the largest int8 scale
SHARES = tuple(sign * (0.7 + 0.05 * j) for sign in (1, -1) for j in range(11))  # of the largest weight
NEAR = (0.95, 1.0, 1.05)  # of a scale that was found for a table like this one
ROUNDS = 3  # of table and scales
SAMPLE = 2**17  # weights that the table is learned from
BINS, REACH = 2**13, 2.0  # of the histogram of w/scale, and the places where the nearest entry is looked up
# The 16 entries of NF4 (Dettmers et al., 2023, appendix E): the start that the result is measured against at 4 bits.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def fit_shared(rows: Tensor, importance: Tensor | None, bits: int, *, grouped: bool) -> dict[str, Tensor]:
    """Fit the table and the scales of rows [R, n], |w| < 2^15, every weight counted `importance` [R, n] times.

    Returns "codebook" fp16 [k], ascending, and "scale" [R]: fp16, or int8 with "scale_step" fp16 [ceil(R / 256)] where
    the rows are groups of channels.
    """
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))[:, 0]
    step = max(rows.numel() // SAMPLE, 1)
    some, weight = rows[::step], None if importance is None else importance[::step]
    scale, table = largest[::step], rows.new_zeros(0)
    for round_ in range(ROUNDS):
        table = _fit_table(some, scale, weight, bits)
        scale = _search_scales(some, table, scale, weight, NEAR if round_ else SHARES)
    scale = _search_scales(rows, table, largest, importance, SHARES)
    best = _finish(rows, table, scale, importance, grouped=grouped)
    if bits == 4:  # heavy tails may leave the table in a local optimum that is worse than NF4's
        nf4 = _finish(rows, torch.tensor(NF4, device=rows.device), largest.abs(), importance, grouped=grouped)
        best = min(best, nf4, key=lambda fit: fit[0])
    return best[1]


def scales_of(scale: Tensor, scale_step: Tensor | None) -> Tensor:
    """Return the scales as float32, in the shape of `scale` (fp16, or int8 with the steps of its chunks)."""
    if scale_step is None:
        return scale.float()
    steps = scale_step.float().repeat_interleave(CHUNK)[: scale.numel()]
    return scale.float() * steps.view(scale.shape)


def stored_scales(scale: Tensor, scale_step: Tensor | None) -> Tensor:
    """Return scales as they are stored: fp16, or the nearest int8 multiples of the steps of their chunks."""
    if scale_step is None:
        return scale.half()
    steps = scale_step.float().repeat_interleave(CHUNK)[: scale.numel()].view(scale.shape)
    return torch.round(scale / steps).clamp_(-TOP, TOP).to(torch.int8)


def encode(rows: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """Return the uint8 codes [R, n] of rows [R, n] under float32 scales [R] and the ascending table [k]."""
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    for lines, columns in pieces(len(rows), rows.shape[1], piece_budget(rows.device)):
        scaled = rows[lines, columns] * inverse[lines, None]
        codes[lines, columns] = nearest_codes(scaled.view(1, -1), table[None]).view(scaled.shape)
    return codes


def _finish(
    rows: Tensor, table: Tensor, scale: Tensor, importance: Tensor | None, *, grouped: bool
) -> tuple[float, dict[str, Tensor]]:
    """Round table and scales to what is stored; return the squared error and that."""
    table = table.half()
    lookup = _Lookup(table.float())
    if not grouped:
        scale = scale.half()
        error = lookup.error(rows, scale.float(), importance)
        return float(error.sum()), {"codebook": table, "scale": scale}
    chunks = torch.nn.functional.pad(scale, (0, -len(scale) % CHUNK)).view(-1, CHUNK)
    step = (chunks.abs().amax(dim=1) / TOP).half()
    step = torch.where(step > 0, step, step.new_tensor(2.0**-24))  # the least positive fp16
    nearest = torch.round(scale / step.float().repeat_interleave(CHUNK)[: len(scale)])
    best, kept = torch.full_like(scale, torch.inf, dtype=torch.float64), nearest
    for offset in (0, -1, 1):
        code = (nearest + offset).clamp_(-TOP, TOP)
        error = lookup.error(rows, scales_of(code, step), importance)
        kept, best = torch.where(error < best, code, kept), torch.minimum(error, best)
    return float(best.sum()), {"codebook": table, "scale": kept.to(torch.int8), "scale_step": step}


def _fit_table(rows: Tensor, scale: Tensor, importance: Tensor | None, bits: int) -> Tensor:
    """Return the ascending table, float32 [k]: weighted k-means of a histogram of w/scale, every weight scale^2."""
    mass = torch.zeros(BINS, dtype=torch.float64, device=rows.device)
    total = torch.zeros(BINS, dtype=torch.float64, device=rows.device)
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    weight = scale.double().square()
    weight = (weight / weight.mean()).float() if bool(weight.any()) else torch.ones_like(scale)
    for lines, columns in pieces(len(rows), rows.shape[1], piece_budget(rows.device, cpu=2**18)):
        scaled = rows[lines, columns] * inverse[lines, None]
        each = weight[lines, None].expand_as(scaled)
        if importance is not None:
            each = each * importance[lines, columns]
        place = _place(scaled).view(-1)
        mass += torch.bincount(place, each.reshape(-1), BINS)
        total += torch.bincount(place, (each * scaled).view(-1), BINS)
    held = (mass > 0).nonzero()[:, 0]
    mass, total = mass[held][None], total[held][None]
    values, counts = total / mass, torch.nn.functional.pad(mass.cumsum(dim=1), (1, 0))
    prefix = torch.nn.functional.pad(total.cumsum(dim=1), (1, 0))
    spread = (mass * values.square()).sum(dim=1)
    row = SortedRows(max(len(held), 2**bits), values.float(), values.new_zeros(1, 1), prefix, spread, counts)
    return kmeans.fit_codebook(row, bits)[0][0]


def _search_scales(
    rows: Tensor, table: Tensor, start: Tensor, importance: Tensor | None, shares: Sequence[float]
) -> Tensor:
    """Return the best scale of every row [R]: shares of `start` [R], then least squares under its codes."""
    lookup = _Lookup(table)
    scale = start.clone()
    for lines, columns in pieces(len(rows), rows.shape[1], max(piece_budget(rows.device, cpu=2**16), rows.shape[1])):
        piece, base = rows[lines, columns], start[lines]
        weight = None if importance is None else importance[lines, columns]
        best, kept = torch.full_like(base, torch.inf, dtype=torch.float64), base
        for share in shares:
            tried = base * share
            error = lookup.error(piece, tried, weight)
            kept, best = torch.where(error < best, tried, kept), torch.minimum(error, best)
        entries = lookup.entries(piece, kept)
        weighted = entries if weight is None else entries * weight
        square = (weighted * entries).sum(dim=1)
        tried = torch.where(square > 0, (piece * weighted).sum(dim=1) / square.clamp_min(1e-30), kept)
        scale[lines] = torch.where(lookup.error(piece, tried, weight) < best, tried, kept)
    return scale


class _Lookup:
    """The entry nearest to a scaled weight, by its place among BINS: quick, and as good as exact for comparing."""

    def __init__(self, table: Tensor) -> None:
        centers = (torch.arange(BINS, device=table.device) + 0.5) * (2 * REACH / BINS) - REACH
        self.values = table[nearest_codes(centers[None], table[None])[0].long()]

    def entries(self, rows: Tensor, scale: Tensor) -> Tensor:
        """Return table[code] [R, n] of rows [R, n] under scales [R]."""
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        return self.values.index_select(0, _place(rows * inverse[:, None]).view(-1)).view(rows.shape)

    def error(self, rows: Tensor, scale: Tensor, importance: Tensor | None) -> Tensor:
        """Return the weighted sum of squares of every row, float64 [R]."""
        errors = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
        budget = max(piece_budget(rows.device, cpu=2**16), rows.shape[1])
        for lines, columns in pieces(len(rows), rows.shape[1], budget):
            piece, s = rows[lines, columns], scale[lines]
            difference = self.entries(piece, s).mul_(s[:, None]).sub_(piece).square_()
            if importance is not None:
                difference.mul_(importance[lines, columns])
            errors[lines] = difference.sum(dim=1).double()
        return errors


def _place(scaled: Tensor) -> Tensor:
    """Return the bin of every scaled weight, int32."""
    return scaled.mul(BINS / (2 * REACH)).add_(BINS / 2).clamp_(0, BINS - 1).int()
