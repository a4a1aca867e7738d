"""Quantized weights whose tables and scales can be trained: codes stay, bytes stay, what is decoded follows.

Entries of int8 tables are rounded in the forward pass and their gradient is passed straight through (Bengio et al.,
2013), so that training sees what will be stored. fp16 rounds a thousand times finer than that and is left out.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quantdm.quantizers import QuantizedWeight, shared
from quantdm.quantizers.branches import add_branches
from quantdm.quantizers.packing import pack_codes, unpack_codes
from quantdm.quantizers.refit import ScaleFit, Segments, places, sort_tables
from quantdm.quantizers.rows import row_layout
from quantdm.quantizers.turning import turned_back
from quantdm.quantizers.uniform import MIN_SCALE
from quantdm.quantizers.weight import halves, parameters_of, tables_of
from quantdm.schemes import Scheme

LARGEST = torch.finfo(torch.float16).max  # of stored entries and scales: small tables have large scales


class TunableWeight(nn.Module):
    """One quantized weight; calling it decodes it in float32, `stored` gives it back as it is stored."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.weight = weight
        self.columns = dict(halves(weight.shape, weight.split))
        self.branches: Tensor | None = None  # which stay as they are
        if weight.scheme.branch_rank:
            none = torch.zeros(weight.shape, device=next(iter(weight.tensors.values())).device)
            self.branches = add_branches(none, weight.scheme, weight.tensors)
        self.halves = nn.ModuleList(_half(weight, suffix, columns) for suffix, columns in self.columns.items())

    def forward(self) -> Tensor:
        """Return the decoded weight, float32, in its shape."""
        found = [half() for half in self.halves]
        dense = (found[0] if len(found) == 1 else torch.cat(found, dim=1)).view(self.weight.shape)
        dense = turned_back(dense, self.weight.scheme, self.weight.tensors, self.weight.split)
        return dense if self.branches is None else dense + self.branches

    @torch.no_grad()
    def stored(self) -> QuantizedWeight:
        """Return the weight with its tables and scales as they were trained."""
        tensors = dict(self.weight.tensors)
        for suffix, half in zip(self.columns, self.halves, strict=True):
            assert isinstance(half, (TunableTable, TunableScale))
            tensors |= {key + suffix: value for key, value in half.stored().items()}
        return QuantizedWeight.from_tensors(
            self.weight.scheme, self.weight.shape, self.weight.split, self.weight.dtype, tensors
        )


def _half(weight: QuantizedWeight, suffix: str, columns: slice) -> "TunableTable | TunableScale":
    scheme, (lines, width) = weight.scheme, (weight.shape[0], columns.stop - columns.start)
    parameters = {key: weight.tensors[key + suffix] for key in parameters_of(scheme)}
    codes = unpack_codes(parameters["codes"], scheme.bits, lines * width).view(lines, width)
    length = row_layout(lines, width, scheme)[2]
    kind = TunableTable if scheme.method == "kmeans" and scheme.granularity != "shared" else TunableScale
    return kind(scheme, parameters, codes, length)


class TunableTable(nn.Module):
    """The codebooks of rows, groups or a tensor."""

    def __init__(self, scheme: Scheme, parameters: Mapping[str, Tensor], codes: Tensor, length: int) -> None:
        super().__init__()
        table = tables_of(scheme, dict(parameters))
        self.bits, self.factor = scheme.bits, float(parameters["factor"])
        self.step = parameters["scale"].float()[:, :, None] if scheme.table == "int8" else None
        self.table = nn.Parameter(table.clone())
        self.fit = places(codes, table, length)

    def forward(self) -> Tensor:
        """Return the decoded matrix [C, n]."""
        table = self.table
        if self.step is not None:
            table = table + ((self._rounded() * self.step) - table).detach()
        return self.fit.decode(table) * self.factor

    def _rounded(self) -> Tensor:
        assert self.step is not None
        return (self.table.detach() / self.step).round_().clamp_(-127, 127)

    def stored(self) -> dict[str, Tensor]:
        """Return codebook and codes as they are stored: entries ascend, so codes may change their names."""
        if self.step is not None:
            table, dtype = self._rounded(), torch.int8
        else:
            table, dtype = self.table.detach().clamp(-LARGEST, LARGEST), torch.float16
        ascending, _, codes = sort_tables(table, self.fit)
        return {"codebook": ascending.to(dtype), "codes": pack_codes(codes.view(-1), self.bits)}


class TunableScale(nn.Module):
    """The scales of a grid, or the scales and the one table of a shared codebook; zero points stay."""

    def __init__(self, scheme: Scheme, parameters: Mapping[str, Tensor], codes: Tensor, length: int) -> None:
        super().__init__()
        self.scheme, self.factor = scheme, float(parameters["factor"])
        self.scale_step = parameters.get("scale_step")
        scale = shared.scales_of(parameters["scale"], self.scale_step)
        self.start = parameters["scale"]
        self.scale = nn.Parameter(scale.clone())
        unit = dict(parameters) | {"scale": torch.ones_like(scale)}
        unit.pop("scale_step", None)
        grid = parameters["codebook"].float() if scheme.granularity == "shared" else tables_of(scheme, unit)
        self.segments = Segments(scale.shape[0], scale.shape[1], length)
        self.fit = places(codes, grid, length)
        self.grid = nn.Parameter(grid.clone(), requires_grad=scheme.granularity == "shared")

    def forward(self) -> Tensor:
        """Return the decoded matrix [C, n]."""
        scale = self.scale
        if self.scale_step is not None:
            stored = shared.stored_scales(scale.detach(), self.scale_step)
            scale = scale + (shared.scales_of(stored, self.scale_step) - scale).detach()
        decoded = ScaleFit((self.fit.decode(self.grid),), self.segments).decode(scale[:, :, None])
        return decoded * self.factor

    def stored(self) -> dict[str, Tensor]:
        """Return scales (and the table) as they are stored; a scale that would not be a normal number stays."""
        scale = shared.stored_scales(self.scale.detach().clamp(-LARGEST, LARGEST), self.scale_step)
        if self.scheme.granularity == "shared":
            return {"scale": scale, "codebook": self.grid.detach().clamp(-LARGEST, LARGEST).half()}
        floor = scale.abs() if self.scheme.symmetric else scale
        return {"scale": torch.where(floor >= MIN_SCALE, scale, self.start)}
