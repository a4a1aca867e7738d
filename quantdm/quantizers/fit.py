"""Quantize a matrix: fit the grid of every row, then choose the codes by rounding or with error feedback."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantdm.quantizers import kmeans, log2, shared, uniform
from quantdm.quantizers.columns import NARROW, STACKED_ROWS, STACKED_WEIGHTS
from quantdm.quantizers.feedback import InputFactor, factorize, feedback_codes
from quantdm.quantizers.grid import MOST_ENTRIES, fit_to_grid
from quantdm.quantizers.moments import Moments
from quantdm.quantizers.objective import OutputError
from quantdm.quantizers.packing import pack_codes
from quantdm.quantizers.refine import evaluate, lesser, refine
from quantdm.quantizers.rows import row_blocks, row_layout
from quantdm.quantizers.sorted_rows import SortedRows, sort_rows
from quantdm.quantizers.tables import nearest_codes, round_codebook
from quantdm.quantizers.weight import QuantizedWeight, factor_of, halves, parameters_of, tables_of
from quantdm.schemes import Scheme

LARGE = 2**26  # entries of moments, a quarter of a gigabyte


@dataclass(frozen=True, eq=False)
class MatrixFit:
    """Quantizes matrices of one layer in the coordinates of a turning; factorized moments are kept between calls."""

    shape: tuple[int, ...]
    split: int | None
    moments: Moments | None  # in these coordinates
    name: str
    exact: bool
    sweeps: int
    inputs: dict[str, InputFactor] = field(default_factory=dict)

    def __call__(
        self, matrix: Tensor, schemes: Sequence[Scheme], dtype: torch.dtype, more: Mapping[str, Tensor]
    ) -> list[QuantizedWeight]:
        """Return a matrix [C, n] under every scheme.

        Args:
            matrix: the weight in these coordinates.
            schemes: of one turning, without branches.
            dtype: of the weight before.
            more: what is stored beside what every quantizer has.
        """
        stored: list[dict[str, Tensor]] = [dict(more) for _ in schemes]
        calibrated = any(scheme.calibration is not None for scheme in schemes)
        for suffix, columns in halves(self.shape, self.split):
            half = matrix[:, columns]
            factor = factor_of(half)
            half = half.mul(1 / factor).contiguous()  # exact: the factor is a power of two
            moments = self.moments.part(columns) if calibrated and self.moments is not None else None
            for i, parameters in self._fit_half(half, schemes, moments, suffix):
                parameters["factor"] = torch.tensor([factor], dtype=torch.float32, device=matrix.device)
                stored[i] |= {key + suffix: parameters[key] for key in parameters_of(schemes[i])}
        return [QuantizedWeight(s, self.shape, self.split, dtype, t) for s, t in zip(schemes, stored, strict=True)]

    def _factor(self, suffix: str, moments: Moments) -> InputFactor:
        """Return the factorized moments of one half; of two large ones only that of the last is kept."""
        if suffix not in self.inputs:
            if moments.second.numel() > LARGE:
                self.inputs.clear()
            self.inputs[suffix] = factorize(moments, self.name)
        return self.inputs[suffix]

    def _fit_half(
        self, half: Tensor, schemes: Sequence[Scheme], moments: Moments | None, suffix: str
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield (index of the scheme, its stored tensors) for one quantizer's matrix [C, n].

        Grids of all schemes come first, the codes with error feedback last: sorted rows and moments take the most
        memory, and are never there together.
        """
        importance = None if moments is None else moments.importance_of(len(half), half.device)
        if moments is not None:
            moments.let_go()
        grids = dict(self._grids(half, schemes, importance))
        del importance
        fed_back = [i for i in grids if schemes[i].calibration == "feedback"]
        for i in grids.keys() - set(fed_back):
            yield i, self._coded(half, schemes[i], grids[i])
        if not fed_back or moments is None:
            return
        held = moments.held().to(half.device)
        inputs = self._factor(suffix, held)
        error = OutputError(half, held.second)
        for stack in _stacks(half, schemes, fed_back):
            own, start = [schemes[i] for i in stack], [grids.pop(i) for i in stack]
            found = _fed_back(error, own, start, inputs, self.sweeps)
            for i, (parameters, codes) in zip(stack, found, strict=True):
                yield i, parameters | {"codes": pack_codes(codes.reshape(-1), schemes[i].bits)}

    def _grids(
        self, half: Tensor, schemes: Sequence[Scheme], importance: Tensor | None
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield (index of the scheme, what is stored beside its codes); schemes of one kind share the sorted rows."""
        kinds = [(s.granularity, s.group_size, s.calibration is not None) for s in schemes]
        for kind in dict.fromkeys(kinds):
            same = [i for i in range(len(schemes)) if kinds[i] == kind]
            first, own = schemes[same[0]], importance if kind[2] else None
            if kind[0] == "shared":
                rows, weight = _padded_rows(half, own, first)
                for i in same:
                    yield i, _fit_shared(rows, weight, schemes[i], len(half))
                continue
            blocks = _rows(half, first)
            weights: list[Tensor | None] = [None] * len(blocks) if own is None else [*_rows(own, first)]
            is_kmeans = any(schemes[i].method == "kmeans" for i in same)
            ordered = [sort_rows(*pair) for pair in zip(blocks, weights, strict=True)] if is_kmeans else []
            for i in same:
                yield i, _fit(schemes[i], blocks, weights, ordered, half.shape, exact=self.exact)

    def _coded(self, half: Tensor, scheme: Scheme, grid: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a grid with the codes of the nearest entries."""
        codes = _round(scheme, _blocks(half, scheme), grid, half.shape[1])
        return grid | {"codes": pack_codes(codes.reshape(-1), scheme.bits)}


def _stacks(half: Tensor, schemes: Sequence[Scheme], which: Sequence[int]) -> list[list[int]]:
    """Return which schemes go through the columns of a matrix [C, n] together: a few, or one of a large matrix."""
    most = max(min(STACKED_ROWS // len(half), STACKED_WEIGHTS // half.numel()), 1)
    kinds: dict[tuple[int, bool], list[int]] = {}
    for i in which:
        _, groups, length = row_layout(len(half), half.shape[1], schemes[i])
        kinds.setdefault((length if groups > 1 else 0, 2 ** schemes[i].bits > NARROW), []).append(i)
    return [same[first : first + most] for same in kinds.values() for first in range(0, len(same), most)]


def _fed_back(
    error: OutputError,
    schemes: Sequence[Scheme],
    grids: Sequence[dict[str, Tensor]],
    inputs: InputFactor,
    sweeps: int,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield parameters and codes [C, n] after error feedback, where it beats rounding, and `sweeps` of refinement."""
    half = error.matrix
    length = row_layout(len(half), half.shape[1], schemes[0])[2]
    tables = [tables_of(*pair) for pair in zip(schemes, grids, strict=True)]
    starts = []
    for scheme, grid, codes in zip(schemes, grids, feedback_codes(half, tables, length, inputs), strict=True):
        rounded = _round(scheme, _blocks(half, scheme), grid, half.shape[1]).view(half.shape)
        starts.append(lesser(*(evaluate(error, scheme, grid, each, length) for each in (codes, rounded))))
    for best in refine(error, schemes, starts, length, sweeps=sweeps):
        yield best.parameters, best.codes


def _rows(matrix: Tensor, scheme: Scheme) -> list[Tensor]:
    """Return the rows [R, length] of a matrix [C, n]; two blocks when the last group of a channel is shorter."""
    return [block.reshape(-1, block.shape[2]).contiguous() for block in row_blocks(matrix, scheme)]


def _blocks(matrix: Tensor, scheme: Scheme) -> list[Tensor]:
    """Return the rows of a matrix [C, n] as a scheme has them."""
    return [_padded_rows(matrix, None, scheme)[0]] if scheme.granularity == "shared" else _rows(matrix, scheme)


def _padded_rows(matrix: Tensor, importance: Tensor | None, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Return rows [R, length] of a matrix [C, n] and their importance; a shorter last group is filled up with zeros."""
    _, groups, length = row_layout(matrix.shape[0], matrix.shape[1], scheme)
    padding = (0, groups * length - matrix.shape[1])
    if padding[1] and importance is None:
        importance = torch.ones_like(matrix)
    if importance is not None:
        importance = torch.nn.functional.pad(importance, padding).view(-1, length)
    return torch.nn.functional.pad(matrix, padding).view(-1, length), importance


def _fit_shared(rows: Tensor, importance: Tensor | None, scheme: Scheme, lines: int) -> dict[str, Tensor]:
    parameters = shared.fit_shared(rows, importance, scheme.bits, grouped=scheme.group_size is not None)
    return parameters | {
        "codebook": parameters["codebook"].view(1, 1, -1),
        "scale": parameters["scale"].view(lines, -1),
    }


def _fit_uniform(
    rows: Tensor, importance: Tensor | None, ordered: SortedRows | None, scheme: Scheme, exact: bool
) -> dict[str, Tensor]:
    p = scheme.p if scheme.calibration is None else 2
    if scheme.symmetric:
        return {"scale": uniform.search_symmetric(rows, scheme.bits, importance=importance, p=p)}
    scale, zero_point = uniform.search_range(rows, scheme.bits, importance=importance, p=p)
    return {"scale": scale, "zero_point": zero_point}


def _fit_kmeans(
    rows: Tensor, importance: Tensor | None, ordered: SortedRows | None, scheme: Scheme, exact: bool
) -> dict[str, Tensor]:
    assert ordered is not None
    codebook, counts = kmeans.fit_codebook(ordered, scheme.bits, exact=exact)
    if scheme.table == "int8":
        table, scale = round_codebook(codebook, counts)
        if codebook.shape[1] <= MOST_ENTRIES and not ordered.is_long:
            heavy = kmeans.has_outliers(ordered).nonzero()[:, 0]
            if len(heavy):
                table[heavy], scale[heavy] = fit_to_grid(ordered[heavy], codebook[heavy], table[heavy], scale[heavy])
        return {"codebook": table, "scale": scale}
    return {"codebook": codebook.half()}


def _fit_log2(
    rows: Tensor, importance: Tensor | None, ordered: SortedRows | None, scheme: Scheme, exact: bool
) -> dict[str, Tensor]:
    p = scheme.p if scheme.calibration is None else 2
    scale = log2.search_scale(rows, scheme.bits, half_steps=scheme.half_steps, importance=importance, p=p)
    return {"scale": scale}


_FIT: dict[str, Callable[[Tensor, Tensor | None, SortedRows | None, Scheme, bool], dict[str, Tensor]]] = {
    "uniform": _fit_uniform,
    "kmeans": _fit_kmeans,
    "log2": _fit_log2,
}


def _fit(
    scheme: Scheme,
    blocks: list[Tensor],
    weights: list[Tensor | None],
    ordered: list[SortedRows],
    size: torch.Size,
    *,
    exact: bool,
) -> dict[str, Tensor]:
    """Fit the blocks of equal rows and join their parameters to [lines, groups, ...]."""
    lines, _, length = row_layout(size[0], size[1], scheme)
    fits = [
        _FIT[scheme.method](rows, weights[i], ordered[i] if ordered else None, scheme, exact)
        for i, rows in enumerate(blocks)
    ]
    k = min(2**scheme.bits, length)
    joined = {}
    for key in fits[0]:
        values = [fit[key] for fit in fits]
        if key == "codebook":  # a shorter last group may have fewer weights than entries: its last entry is repeated
            values = [torch.cat([v, v[:, -1:].expand(-1, k - v.shape[1])], dim=1) for v in values]
        shape = (lines, -1) if key != "codebook" else (lines, -1, k)
        joined[key] = torch.cat([v.reshape(shape) for v in values], dim=1).contiguous()
    return joined


def _round(scheme: Scheme, blocks: list[Tensor], parameters: dict[str, Tensor], columns: int) -> Tensor:
    """Return the codes of the nearest entries, uint8 [C, n] (flat for a single row)."""
    if scheme.granularity == "shared":
        scale = shared.scales_of(parameters["scale"], parameters.get("scale_step"))
        codes = shared.encode(blocks[0], scale.view(-1), parameters["codebook"].float().view(-1))
        return codes.view(len(scale), -1)[:, :columns]
    table = None if scheme.method == "uniform" else tables_of(scheme, parameters)
    lines = len(parameters["codebook" if scheme.method == "kmeans" else "scale"])
    codes, first = [], 0
    for rows in blocks:
        groups = slice(first, first + len(rows) // lines)
        first = groups.stop
        if table is None:
            scale = parameters["scale"][:, groups].reshape(-1)
            if scheme.symmetric:
                zero_point = torch.full_like(scale, 2 ** (scheme.bits - 1))
            else:
                zero_point = parameters["zero_point"][:, groups].reshape(-1)
            found = uniform.encode(rows, scale, zero_point, scheme.bits)
        else:
            found = nearest_codes(rows, table[:, groups].reshape(len(rows), -1))
        codes.append(found.view(lines, -1))
    return torch.cat(codes, dim=1)
