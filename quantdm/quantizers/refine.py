"""Refine a calibrated weight: refit what is stored beside the codes, descend on the codes, and again.

Every step is kept row by row only where it lowers the exact objective (`OutputError`) with everything rounded to what
is stored, so refining never makes a row worse, whatever H is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantdm.quantizers import shared
from quantdm.quantizers.descent import descend
from quantdm.quantizers.objective import OutputError
from quantdm.quantizers.refit import ScaleFit, Segments, places, solve, sort_tables
from quantdm.quantizers.tables import round_codebook
from quantdm.quantizers.uniform import MAX_ZERO, MIN_SCALE
from quantdm.quantizers.weight import tables_of
from quantdm.schemes import Scheme

ENOUGH = 0.99  # sweeps end when one leaves more than this share of the objective: all further ones gain 0.1 %
LARGEST = 2.0**15  # entries and steps stay below it, as those of every fit
Parameters = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Fitted:
    """A weight matrix [C, n] as it would be stored: parameters, uint8 codes [C, n], and what they give.

    `errors` is the objective of every row of `decoded`, float64 [C].
    """

    parameters: Parameters
    codes: Tensor
    decoded: Tensor
    errors: Tensor


def evaluate(error: OutputError, scheme: Scheme, parameters: Parameters, codes: Tensor, length: int) -> Fitted:
    """Decode codes [C, n] under stored parameters and say what they are worth."""
    table = tables_of(scheme, parameters)
    decoded = places(codes, table, length).decode(table)
    return Fitted(parameters, codes, decoded, error.of_rows(decoded))


def refine(
    error: OutputError, schemes: Sequence[Scheme], starts: Sequence[Fitted], length: int, *, sweeps: int
) -> list[Fitted]:
    """Return weights after `sweeps` rounds of refit and descent, or fewer when a round gains nothing.

    They are the same matrix under several schemes whose tables have as many groups, each of `length` columns.
    """
    best, going = list(starts), list(range(len(starts)))
    for _ in range(sweeps):
        before = [float(each.errors.sum()) for each in best]
        for i in going:
            best[i] = _refitted(error, schemes[i], best[i], length)
        tables = [tables_of(schemes[i], best[i].parameters) for i in going]
        moved = descend(error, [best[i].decoded for i in going], [best[i].codes for i in going], tables, length)
        for i, (decoded, codes) in zip(going, moved, strict=True):
            best[i] = lesser(best[i], replace(best[i], codes=codes, decoded=decoded, errors=error.of_rows(decoded)))
        going = [i for i in going if float(best[i].errors.sum()) < ENOUGH * before[i]]
        if not going:
            break
    return best


def _refitted(error: OutputError, scheme: Scheme, best: Fitted, length: int) -> Fitted:
    for refit in _refits(scheme):
        parameters, codes = refit(error, scheme, best, length)
        best = lesser(best, evaluate(error, scheme, parameters, codes, length))
    return best


def lesser(one: Fitted, other: Fitted) -> Fitted:
    """Return every row with the lesser error, or the whole matrix where what differs is shared by rows."""
    lines = len(one.codes)
    changed = [key for key, value in other.parameters.items() if value is not one.parameters[key]]
    if any(len(other.parameters[key]) != lines for key in changed):
        return other if float(other.errors.sum()) < float(one.errors.sum()) else one
    better = other.errors < one.errors

    def pick(old: Tensor, new: Tensor) -> Tensor:
        return torch.where(better.view(-1, *[1] * (new.dim() - 1)), new, old)

    mixed = {key: pick(one.parameters[key], other.parameters[key]) for key in changed}
    return Fitted(
        one.parameters | mixed,
        pick(one.codes, other.codes),
        pick(one.decoded, other.decoded),
        pick(one.errors, other.errors),
    )


Refit = Callable[[OutputError, Scheme, Fitted, int], tuple[Parameters, Tensor]]


def _refits(scheme: Scheme) -> tuple[Refit, ...]:
    """Return what can be refitted under a scheme, in turn."""
    if scheme.granularity == "shared":
        return _refit_shared_table, _refit_shared_scale
    if scheme.method == "kmeans":
        return (_refit_tables,)
    return (_refit_scale,) if scheme.symmetric or scheme.method == "log2" else (_refit_grid, _refit_scale)


def _refit_tables(error: OutputError, scheme: Scheme, now: Fitted, length: int) -> tuple[Parameters, Tensor]:
    """Refit the codebooks of rows, groups or the tensor."""
    table = tables_of(scheme, now.parameters)
    fit = places(now.codes, table, length)
    theta, order, codes = sort_tables(solve(error, fit, table).clamp(1 - LARGEST, LARGEST - 1), fit)
    if scheme.table != "int8":
        return {**now.parameters, "codebook": theta.half()}, codes
    mass = fit.weigh(error.curvature()).gather(2, order)
    entries, scale = round_codebook(theta.flatten(0, 1), mass.flatten(0, 1))
    return {**now.parameters, "codebook": entries.view(theta.shape), "scale": scale.view(theta.shape[:2])}, codes


def _segments(scale: Tensor, length: int) -> Segments:
    return Segments(scale.shape[0], scale.shape[1], length)


def _refit_grid(error: OutputError, scheme: Scheme, now: Fitted, length: int) -> tuple[Parameters, Tensor]:
    """Refit the steps and zero points of uniform grids together."""
    old, zero = now.parameters["scale"], now.parameters["zero_point"]
    codes = now.codes.float()
    fit = ScaleFit((codes, torch.ones_like(codes)), _segments(old, length))
    start = torch.stack([old.float(), -old.float() * zero], dim=2)
    step, offset = solve(error, fit, start).unbind(dim=2)
    step = torch.where(step >= MIN_SCALE, step, old.float()).clamp(max=LARGEST).half()
    zero = torch.round(-offset / step.float()).clamp(-MAX_ZERO, MAX_ZERO).to(torch.int16)
    return {**now.parameters, "scale": step, "zero_point": zero}, now.codes


def _refit_scale(error: OutputError, scheme: Scheme, now: Fitted, length: int) -> tuple[Parameters, Tensor]:
    """Refit the steps of grids whose shape stays."""
    old = now.parameters["scale"]
    unit = tables_of(scheme, {**now.parameters, "scale": torch.ones_like(old)})
    fit = ScaleFit((places(now.codes, unit, length).decode(unit),), _segments(old, length))
    scale = solve(error, fit, old.float()[:, :, None])[:, :, 0].clamp(-LARGEST, LARGEST)
    good = scale.abs() >= MIN_SCALE if scheme.symmetric else scale >= MIN_SCALE
    return {**now.parameters, "scale": torch.where(good, scale, old.float()).half()}, now.codes


def _refit_shared_table(error: OutputError, scheme: Scheme, now: Fitted, length: int) -> tuple[Parameters, Tensor]:
    """Refit the one table under the scales."""
    scale = shared.scales_of(now.parameters["scale"], now.parameters.get("scale_step"))
    gain = _segments(scale, length).spread(scale, now.codes.shape[1]).expand_as(now.decoded)
    codebook = now.parameters["codebook"].float()
    fit = replace(places(now.codes, codebook, length), gain=gain)
    theta, _, codes = sort_tables(solve(error, fit, codebook).clamp(1 - LARGEST, LARGEST - 1), fit)
    return {**now.parameters, "codebook": theta.half()}, codes


def _refit_shared_scale(error: OutputError, scheme: Scheme, now: Fitted, length: int) -> tuple[Parameters, Tensor]:
    """Refit the scales under the one table; those of groups stay multiples of their steps."""
    codebook = now.parameters["codebook"].float()
    scale = shared.scales_of(now.parameters["scale"], now.parameters.get("scale_step"))
    fit = ScaleFit((places(now.codes, codebook, length).decode(codebook),), _segments(scale, length))
    found = solve(error, fit, scale[:, :, None])[:, :, 0]
    return {**now.parameters, "scale": shared.stored_scales(found, now.parameters.get("scale_step"))}, now.codes
