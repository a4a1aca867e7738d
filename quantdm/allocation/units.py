"""What is chosen together: single layers, tied layers or whole blocks, with the assignments that a request permits."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantdm.errors import QuantDMError, nearest
from quantdm.surrogates.block_scores import BlockScores
from quantdm.surrogates.space import SearchSpace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Forbidden = Collection[str] | Mapping[str, Collection[str]]


@dataclass(frozen=True, eq=False)
class Unit:
    """Layers [n] of which one row of `assignments` [N, n] is taken, each with its value [N] and its bits [N]."""

    layers: Ints
    assignments: Ints
    values: Floats
    bits: Ints


def build_units(
    space: SearchSpace,
    values: ArrayLike,
    *,
    blocks: Sequence[BlockScores] = (),
    pins: Mapping[str, str] | None = None,
    ties: Sequence[Sequence[str]] = (),
    forbidden: Forbidden = (),
) -> list[Unit]:
    """Return the units of a request, each with the assignments that pins, ties and forbidden schemes leave.

    Without `blocks` a unit is a layer, or tied layers. With them it is a block: the value of an assignment is the mean
    of its scores over folds plus the `values` [L, O] of its layers; layers in none of the blocks stay units.

    Raises:
        QuantDMError: unknown layers or schemes, contradicting requests, or nothing left to choose for some unit.
    """
    table = check_values(space, values)
    permitted = _permitted(space, pins or {}, forbidden)
    group_of = _groups(space, ties)
    units, held = [], np.zeros(len(space.layers), dtype=bool)
    for block in blocks:
        layers = np.array(block.layers, dtype=np.int64)
        _check_inside(space, block, group_of)
        rows = block.assignments
        fits = permitted[layers, rows].all(axis=1)
        for column, layer in enumerate(layers):
            fits &= rows[:, column] == rows[:, int(np.argmax(group_of[layers] == group_of[layer]))]
        if not fits.any():
            raise QuantDMError(
                f"block {block.name!r}: pins, ties and forbidden schemes leave none of its {len(rows)} assignments; "
                "drop one of them"
            )
        rows = rows[fits]
        score = block.scores.mean(axis=0)[fits] + table[layers, rows].sum(axis=1)
        units.append(Unit(layers, rows, score, space.bits[layers, rows].sum(axis=1)))
        held[layers] = True
    for group in np.unique(group_of[~held]):
        members = np.flatnonzero(group_of == group)
        options = np.flatnonzero(permitted[members].all(axis=0))
        if not len(options):
            raise QuantDMError(_nothing_left(space, members, pins or {}))
        rows = np.repeat(options[:, None], len(members), axis=1)
        units.append(Unit(members, rows, table[members, rows].sum(axis=1), space.bits[members, rows].sum(axis=1)))
    return units


def assemble(space: SearchSpace, units: Sequence[Unit], picked: Sequence[int] | Ints) -> Ints:
    """Return the choice [L] in which every unit takes its picked assignment."""
    choice = np.empty(len(space.layers), dtype=np.int64)
    for unit, pick in zip(units, picked, strict=True):
        choice[unit.layers] = unit.assignments[pick]
    return choice


def budget_for(space: SearchSpace, units: Sequence[Unit], target_bits: float | None, max_bits: int | None) -> int:
    """Return a budget in total bits, given as an average or a total, that the units can meet.

    Raises:
        QuantDMError: no or two budgets, or one below what the units reach; the message says what can be reached.
    """
    if (target_bits is None) == (max_bits is None):
        raise QuantDMError("select: give exactly one of target_bits (average) and max_bits (total)")
    budget = int(max_bits) if max_bits is not None else budget_of(space, float(target_bits))  # type: ignore[arg-type]
    low, total = sum(int(unit.bits.min()) for unit in units), int(space.num_weights.sum())
    if budget < low:
        high, free = sum(int(unit.bits.max()) for unit in units), int(space.bits.min(axis=1).sum())
        held = (
            f" (without pins, ties and forbidden schemes from {free / total:.4f}: they hold {low - free} bits)"
            if low > free
            else ""
        )
        raise QuantDMError(
            f"budget: got {budget / total:.4f} bits per weight ({budget} bits), but with these options, pins and ties "
            f"{low / total:.4f} to {high / total:.4f} can be reached{held}; raise the budget or add options with "
            "fewer bits"
        )
    return budget


def budget_of(space: SearchSpace, target_bits: float) -> int:
    """Return the total bits that an average of `target_bits` per weight allows, rounded down."""
    if not np.isfinite(target_bits) or target_bits <= 0:
        raise QuantDMError(f"target_bits: got {target_bits}, expected a positive number of bits per weight")
    total = int(space.num_weights.sum())
    budget = int(np.floor(target_bits * total))
    return budget + int((budget + 1) / total <= target_bits)  # a target computed as bits / weights must allow itself


def check_values(space: SearchSpace, values: ArrayLike) -> Floats:
    """Return values as float64 [L, O].

    Raises:
        QuantDMError: wrong shape or not finite.
    """
    table = np.asarray(values, dtype=np.float64)
    shape = (len(space.layers), len(space.options))
    if table.shape != shape:
        raise QuantDMError(f"values: got shape {table.shape}, expected [layers, options] = {shape}")
    if not np.isfinite(table).all():
        raise QuantDMError(f"values: {int((~np.isfinite(table)).sum())} of {table.size} are NaN or infinite")
    return table


def _permitted(space: SearchSpace, pins: Mapping[str, str], forbidden: Forbidden) -> NDArray[np.bool_]:
    """Return which option every layer may take, [L, O]."""
    if isinstance(forbidden, str):
        raise QuantDMError(f"forbidden: got the string {forbidden!r}, expected a set of scheme labels")
    banned = dict(forbidden) if isinstance(forbidden, Mapping) else dict.fromkeys(space.layer_names, forbidden)
    for name in [*pins, *banned]:
        _check_layer(space, name)
    for what, labels in (("pin", pins.values()), ("forbidden", {x for row in banned.values() for x in row})):
        for label in labels:
            if label not in space.labels:
                raise QuantDMError(f"{what}: {label!r} is no option; {nearest(label, space.labels)}")
    permitted = np.ones(space.bits.shape, dtype=bool)
    for name, labels in banned.items():
        permitted[space.layer_index[name], [space.labels.index(label) for label in labels]] = False
    for name, label in pins.items():
        if label in banned.get(name, ()):
            raise QuantDMError(f"pin of {name!r}: {label!r} is forbidden there; drop the pin or allow the scheme")
        permitted[space.layer_index[name]] = np.arange(len(space.labels)) == space.labels.index(label)
    return permitted


def _groups(space: SearchSpace, ties: Sequence[Sequence[str]]) -> Ints:
    """Return the first of the layers that each layer is tied to, directly or through others, [L]."""
    group_of = np.arange(len(space.layers))
    for tie in ties:
        for name in tie:
            _check_layer(space, name)
        groups = group_of[[space.layer_index[name] for name in tie]]
        group_of[np.isin(group_of, groups)] = groups.min(initial=len(group_of))
    return group_of


def _check_layer(space: SearchSpace, name: str) -> None:
    if name not in space.layer_index:
        raise QuantDMError(f"layer {name!r} is not in this model; {nearest(name, space.layer_names)}")


def _check_inside(space: SearchSpace, block: BlockScores, group_of: Ints) -> None:
    layers = list(block.layers)
    outside = np.isin(group_of, group_of[layers])
    outside[layers] = False
    if outside.any():
        raise QuantDMError(
            f"ties: {space.layer_names[int(np.flatnonzero(outside)[0])]!r} is tied to a layer of block {block.name!r}; "
            "whole blocks are chosen one by one, so tie layers within a block, or choose single layers"
        )


def _nothing_left(space: SearchSpace, members: Ints, pins: Mapping[str, str]) -> str:
    names = [space.layer_names[member] for member in members]
    wanted = {name: pins[name] for name in names if name in pins}
    if len(set(wanted.values())) > 1:
        return f"pins: tied layers are pinned to different schemes: {wanted}"
    tied = f" (tied to {len(names) - 1} more)" if len(names) > 1 else ""
    return f"forbidden: nothing is left for layer {names[0]!r}{tied}; allow one of {', '.join(space.labels)}"
