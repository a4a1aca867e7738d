"""One-dimensional k-means, one codebook per row, close to the exact optimum and vectorised over rows.

A clustering of a sorted row is a set of k - 1 cuts. With prefix sums S of the row, the squared error of the cuts p is
sum w^2 - sum_j (S[p_j+1] - S[p_j])^2 / (p_j+1 - p_j), so every step below costs O(k) or O(k·W^2) per row, not O(n):

1. Start: the optimal density of levels is proportional to f^(1/3) (Panter and Dite, 1951). 513 quantiles; the gap
   between two of them has f = 1/gap, hence weighs gap^(2/3); cut at equal cumulative weight. With more than 16 levels
   the quantiles are all the weights, and no gap takes more than one level: what lies beside it does not need two.
2. Lloyd: means, middles, cuts by binary search in the sorted row.
3. Window dynamic program: every cut may move to one of W places between its neighbours; the best combination is found
   exactly (Viterbi over the cuts), then the window is narrowed. This leaves the local optima in which Lloyd stops,
   where a level is missing on one side and spare on the other: on Gaussian rows of 1152 with 16 levels, 1.001 times
   the exact optimum instead of 1.025. More than 16 levels have a better start and take one round of small windows.
4. Guard: a row whose result is above the error of a grid of the uniform quantizer starts again from that grid. So
   k-means is never worse than uniform, up to the rounding of the stored codebook (see tables.py).
5. Outliers: where a few weights hold nearly all squares, most levels stand for two or three weights each, and which of
   them belong together no window finds out (1.18 times the optimum): these rows get the optimum.
"""

import torch
from torch import Tensor

from quantdm.quantizers.exact import optimal_cuts
from quantdm.quantizers.sorted_rows import SortedRows
from quantdm.quantizers.tables import nearest_codes
from quantdm.quantizers.uniform import candidate_grids

QUANTILES = 513
# (share of the way to the neighbouring cut, places on either side) of the windows, one after another.
WINDOWS = ((1.0, 6), (0.4, 4), (0.15, 3))
FINE = 16  # with more levels than these:
FINE_WINDOWS, CAP_STEPS = ((1.0, 3), (0.3, 2)), 8
EXACT_UNASKED = 64
TAIL, HEAVY = 32, 0.9  # one weight in so many on either side; their share of the squares from which a row is exact
WINDOW_BUDGET = 2**16  # elements of one window table [W, W, rows]
LLOYD_STEPS, MAX_LLOYD_STEPS, NEAR_STEPS = 3, 200, 20
LONG_HALF_WIDTH = 10
# A row whose error fell by more than this share takes another round; most well-behaved rows gain less in the first.
FIRST_GAIN, GAIN, LONG_GAIN, MAX_ROUNDS = 0.04, 0.01, 1e-6, 40
LEAST_COUNT = 1e-12  # in place of an empty cluster's zero, below any importance


def fit_codebook(rows: SortedRows, bits: int, *, exact: bool = False) -> tuple[Tensor, Tensor]:
    """Return the ascending codebook of every row, float32 [R, k] with k = min(2^bits, n), and how many weights (or how
    much importance) each entry stands for [R, k].

    With `exact` it is the optimum; a single row of few distinct values gets that anyway, up to 64 entries, and so do
    rows of outliers.
    """
    k, m = min(2**bits, rows.n), rows.values.shape[1]
    if m <= k:
        places = torch.arange(m + 1, device=rows.values.device).expand(len(rows.values), -1)
        counts = torch.nn.functional.pad(rows.left_of(places).diff(), (0, k - m))
        return torch.nn.functional.pad(rows.values, (0, k - m), mode="replicate"), counts
    start = _search(rows, _density_start(rows, k))
    if exact or (rows.counts is not None and len(start) == 1 and k <= EXACT_UNASKED):
        cuts = _optimum(rows, _lloyd(rows, start, NEAR_STEPS))
        return (_means(rows, cuts) + rows.center).float(), rows.left_of(cuts).diff(dim=1)
    cuts = _refine(rows, start)
    grid_cuts, grid_score = _best_uniform(rows, bits)
    worse = (grid_score > _score(rows, cuts)).nonzero()[:, 0]
    if len(worse):
        cuts[worse] = _refine(rows[worse], grid_cuts[worse])
    if not rows.is_long and k <= EXACT_UNASKED:
        heavy = has_outliers(rows).nonzero()[:, 0]
        if len(heavy):
            cuts[heavy] = _optimum(rows[heavy], cuts[heavy])
    return (_means(rows, cuts) + rows.center).float(), rows.left_of(cuts).diff(dim=1)


def encode(rows: Tensor, codebook: Tensor) -> Tensor:
    """Return the uint8 codes [R, n] of the nearest entries of the stored codebook [R, k]."""
    return nearest_codes(rows, codebook.float())


def has_outliers(rows: SortedRows) -> Tensor:
    """Return whether the outermost weights of a row hold nearly all of its squares about the center, bool [R]."""
    R, m = rows.values.shape
    end, tails = max(m // TAIL, 1), torch.zeros_like(rows.square)
    for first in (0, m - end):
        places = torch.arange(first, first + end + 1, device=rows.values.device).expand(R, -1)
        distance = rows.values[:, first : first + end].double() - rows.center
        tails += (distance.square_() * rows.left_of(places).diff(dim=1)).sum(dim=1)
    return tails > HEAVY * rows.square


def _optimum(rows: SortedRows, cuts: Tensor) -> Tensor:
    """Return the optimal cuts; those known bound what the program has to look at. Computed on the CPU."""
    R, m = rows.values.shape
    places = torch.arange(m + 1, device=cuts.device).expand(R, -1)
    counts = rows.left_of(places).double()
    squares = ((rows.values.double() - rows.center).square_() * counts.diff(dim=1)).cumsum(dim=1)
    squares = torch.nn.functional.pad(squares, (1, 0))
    known = (squares[:, -1] - _score(rows, cuts)).clamp_min(0)
    sums = (counts.contiguous().cpu().numpy(), rows.prefix.cpu().numpy(), squares.cpu().numpy())
    best = optimal_cuts(sums[0], sums[1], sums[2], cuts.shape[1] - 1, known.cpu().numpy())
    return torch.from_numpy(best).to(cuts.device)


def _refine(rows: SortedRows, cuts: Tensor) -> Tensor:
    """Improve cuts by Lloyd steps and window programs in turn; the error never grows."""
    result, active = _lloyd(rows, cuts, LLOYD_STEPS), torch.arange(len(cuts), device=cuts.device)
    part, error = rows, rows.square - _score(rows, result)
    gain = LONG_GAIN if rows.is_long else FIRST_GAIN
    for _ in range(MAX_ROUNDS if rows.is_long or cuts.shape[1] - 1 <= FINE else 1):
        cuts = _round(part, result[active])
        before, error = error, part.square - _score(part, cuts)
        better = error < before
        result[active[better]] = cuts[better]
        again = before - error > gain * error.clamp_min(0)
        if not bool(again.any()):
            break
        active, part, error = active[again], part[again], error[again]
        gain = min(gain, GAIN)
    return _lloyd(rows, result, MAX_LLOYD_STEPS)


def _round(rows: SortedRows, cuts: Tensor) -> Tensor:
    """Run the windows one after another, on as many rows at a time as fit into a cache."""
    most = max(2, rows.n // (cuts.shape[1] - 1))  # places in a cluster
    spans = WINDOWS if rows.is_long or cuts.shape[1] - 1 <= FINE else FINE_WINDOWS
    windows = [(span, LONG_HALF_WIDTH if rows.is_long else min(half_width, most)) for span, half_width in spans]
    widest = 2 * max(half_width for _, half_width in windows) + 3
    step = max(WINDOW_BUDGET // widest**2, 1) if cuts.device.type == "cpu" else len(cuts)
    parts = []
    for first in range(0, len(cuts), step):
        some, places = rows[first : first + step], cuts[first : first + step]
        for span, half_width in windows:
            places = _lloyd(some, _window_program(some, places, half_width, span), LLOYD_STEPS)
        parts.append(places)
    return torch.cat(parts)


def _density_start(rows: SortedRows, k: int) -> Tensor:
    """Return boundaries [R, k - 1] at equal shares of the cube root of the density."""
    m = min(QUANTILES, rows.n)
    if k > FINE and not rows.is_long:
        return _fine_start(rows, k)
    if rows.counts is None:
        places = torch.linspace(0, rows.n - 1, m, dtype=torch.float64, device=rows.values.device).round().long()
        quantiles = rows.values[:, places].double()
    else:
        share = (torch.arange(m, dtype=torch.float64, device=rows.values.device) + 0.5) / m
        places = torch.searchsorted(rows.counts, share * rows.counts[:, -1:], right=True) - 1
        quantiles = rows.values.gather(1, places).double()
    return _equal_shares(quantiles, quantiles.diff(dim=1).pow_(2 / 3), k)


def _fine_start(rows: SortedRows, k: int) -> Tensor:
    """Return boundaries [R, k - 1] from the gaps between all weights, none of them with more than one level's share."""
    values = rows.values.double()
    share = values.diff(dim=1).pow_(2 / 3)
    if rows.counts is not None:
        mass = rows.counts.diff(dim=1)
        share *= ((mass[:, 1:] + mass[:, :-1]) / 2) ** (1 / 3)
    for _ in range(CAP_STEPS):
        share = torch.minimum(share, share.sum(dim=1, keepdim=True) / k)
    return _equal_shares(values, share, k)


def _equal_shares(quantiles: Tensor, shares: Tensor, k: int) -> Tensor:
    """Return k - 1 boundaries between `quantiles` [R, m] at equal cumulative `shares` [R, m - 1]."""
    m = quantiles.shape[1]
    weight = torch.nn.functional.pad(shares.cumsum(dim=1), (1, 0))
    share = weight[:, -1:] * (torch.arange(1, k, dtype=torch.float64, device=weight.device) / k)
    upper = torch.searchsorted(weight, share).clamp_(1, m - 1)
    low, high = weight.gather(1, upper - 1), weight.gather(1, upper)
    fraction = ((share - low) / (high - low).clamp_min(1e-300)).clamp_(0, 1)
    return torch.lerp(quantiles.gather(1, upper - 1), quantiles.gather(1, upper), fraction)


def _search(rows: SortedRows, boundaries: Tensor) -> Tensor:
    """Return the cuts [R, k + 1], from 0 to n, of the boundaries [R, k - 1]: boundary j lies at place cuts[j + 1]."""
    inner = torch.searchsorted(rows.values, boundaries.to(rows.values.dtype))
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=rows.values.shape[1])


def _score(rows: SortedRows, cuts: Tensor) -> Tensor:
    """Return sum_j S_j^2 / n_j [R]: what the clustering takes off the sum of squares. Larger is better."""
    counts = rows.left_of(cuts).diff(dim=1).double().clamp_min_(LEAST_COUNT)
    return (rows.prefix.gather(1, cuts).diff(dim=1).square_() / counts).sum(dim=1)


def _means(rows: SortedRows, cuts: Tensor) -> Tensor:
    """Return the mean of every cluster about the center, float64 [R, k]; an empty one takes the weight at its cut."""
    counts = rows.left_of(cuts).diff(dim=1)
    means = rows.prefix.gather(1, cuts).diff(dim=1) / counts
    empty = counts == 0
    if bool(empty.any()):
        at_cut = rows.values.gather(1, cuts[:, :-1].clamp_max(rows.values.shape[1] - 1))
        means = torch.where(empty, at_cut - rows.center, means)
    return means


def _lloyd(rows: SortedRows, cuts: Tensor, steps: int) -> Tensor:
    """Repeat means and middles until no cut moves, at most `steps` times; rows that have converged are left out."""
    result = cuts.clone()
    active = torch.arange(len(cuts), device=cuts.device)
    for _ in range(steps):
        means = _means(rows, cuts)
        moved_cuts = _search(rows, (means[:, 1:] + means[:, :-1]).div_(2).add_(rows.center))
        result[active] = moved_cuts
        moved = (moved_cuts != cuts).any(dim=1)
        remaining = int(moved.sum())
        if remaining == 0:
            break
        cuts = moved_cuts
        if remaining < len(cuts) / 2:
            active, rows, cuts = active[moved], rows[moved], cuts[moved]
    return result


def _window_program(rows: SortedRows, cuts: Tensor, half_width: int, span: float) -> Tensor:
    """Return the best cuts among W places for each, `half_width` over `span` of the way to either neighbour.

    Rows are the last axis here, so that every step runs over contiguous memory. Double precision: single
    loses the bulk of a row beside an extreme outlier.
    """
    R, inner = len(cuts), cuts.shape[1] - 2
    share = torch.linspace(0, span, half_width + 1, dtype=torch.float64, device=cuts.device)[1:]
    gap = cuts.diff(dim=1)[:, :, None]
    left = (gap[:, :-1] * share.flip(0)).ceil_().long()
    right = (gap[:, 1:] * share).ceil_().long()
    offsets = [-left, left.new_zeros(R, inner, 1), right]
    if span == 1:  # beside the neighbours too: a lone outlier deserves a level
        offsets += [(1 - gap[:, :-1]).clamp_max(0), (gap[:, 1:] - 1).clamp_min(0)]
    places = cuts[:, 1:-1, None] + torch.cat(offsets, dim=2)  # [R, k - 1, W]
    sums = rows.prefix.gather(1, places.view(R, -1)).view(places.shape).permute(1, 2, 0).contiguous()
    at = rows.left_of(places).double().permute(1, 2, 0).contiguous()
    places = places.permute(1, 2, 0).contiguous()  # [k - 1, W, R]

    # Best score of everything left of a cut, per place: [W, R].
    values = [sums[0].square() / at[0].clamp_min(LEAST_COUNT)]
    for j in range(1, inner):
        values.append(
            _join(values[-1][:, None], sums[j] - sums[j - 1][:, None], at[j] - at[j - 1][:, None]).amax(dim=0)
        )
    choice = _join(values[-1], rows.prefix[:, -1] - sums[-1], rows.total - at[-1]).argmax(dim=0, keepdim=True)  # [1, R]
    moved = cuts.clone()
    for j in reversed(range(inner)):
        moved[:, j + 1] = places[j].gather(0, choice)[0]
        if j:  # the place from which the chosen one was reached
            sum_j, at_j = sums[j].gather(0, choice), at[j].gather(0, choice)
            choice = _join(values[j - 1], sum_j - sums[j - 1], at_j - at[j - 1]).argmax(dim=0, keepdim=True)
    return moved


def _join(value: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """Return value + total^2/count, -inf where the count is negative: cuts must not pass one another."""
    passed = count < 0
    return total.square_().div_(count.clamp_min_(LEAST_COUNT)).add_(value).masked_fill_(passed, -torch.inf)


def _best_uniform(rows: SortedRows, bits: int) -> tuple[Tensor, Tensor]:
    """Return the best cuts [R, 2^bits + 1] that a grid of the uniform quantizer makes, and their score."""
    step, zero = candidate_grids(rows.values[:, 0], rows.values[:, -1], bits)
    middle = torch.arange(2**bits - 1, dtype=torch.float64, device=step.device) + 0.5
    best_cuts = best_score = None
    for a in range(len(step)):
        cuts = _search(rows, (middle - zero[a, :, None]) * step[a, :, None].double())
        score = _score(rows, cuts)
        if best_cuts is None or best_score is None:
            best_cuts, best_score = cuts, score
        else:
            better = score > best_score
            best_cuts = torch.where(better[:, None], cuts, best_cuts)
            best_score = torch.where(better, score, best_score)
    assert best_cuts is not None
    assert best_score is not None
    return best_cuts, best_score
