"""What an explanation says to act on: bytes to save, schemes to share, what names are worth, what is unknown."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantdm.report.figures import describe
from quantdm.report.wording import megabytes, percent
from quantdm.surrogates import Attribution, SearchSpace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
SHARED = 0.02  # of y that a type's layers may lose when they share one scheme, to count as sharing it


@dataclass(frozen=True)
class Saving:
    """The cheapest way to take bits from one layer of a recipe: `loss` is the value lost for `saved_bits`."""

    layer: str
    now: str
    then: str
    saved_bits: int
    loss: float


@dataclass(frozen=True)
class Sharing:
    """Layers of one operation type under the one scheme that serves them best in no more bits than they have."""

    op_type: str
    layers: int
    schemes: int  # that the recipe uses there
    scheme: str
    loss: float  # of value against the recipe; below 0 never: the recipe's own choice is the best of its bits
    saved_bits: int


@dataclass(frozen=True, eq=False)
class Names:
    """What names are worth in y, least squares over all layers and options: method + width, and each type's weight.

    `methods` and `widths` are main effects (they sum to 0 each); `share` is how much of the variance of an option's
    mean value they explain; `roles` is how much of the effect of width an operation type feels, 1 on average.
    """

    methods: dict[str, float]
    widths: dict[int, float]
    roles: dict[str, float]
    share: float


@dataclass(frozen=True)
class Doubt:
    """A layer of a recipe for which the folds do not agree that its option is worth its bits."""

    layer: str
    option: str
    rival: str
    gap: float  # value of the option less that of the rival, which has no more bits; small or negative
    spread: float  # standard deviation over folds of the rival's value or the option's, the larger


def cheapest_savings(space: SearchSpace, values: Floats, choice: Ints, *, top: int = 10) -> list[Saving]:
    """Return where fewer bytes cost least: per layer the smaller option of least loss per bit, best layers first."""
    found = []
    for position, now in enumerate(choice):
        saved, loss = space.bits[position, now] - space.bits[position], values[position, now] - values[position]
        smaller = np.flatnonzero(saved > 0)
        if len(smaller):
            best = int(smaller[np.argmin(loss[smaller] / saved[smaller])])
            name, labels = space.layer_names[position], (space.labels[now], space.labels[best])
            found.append(Saving(name, *labels, saved_bits=int(saved[best]), loss=float(loss[best])))
    return sorted(found, key=lambda item: item.loss / item.saved_bits)[:top]


def shared_schemes(space: SearchSpace, values: Floats, choice: Ints) -> list[Sharing]:
    """Return per operation type of several layers what one scheme for all of them would cost, least first."""
    found, types = [], np.array([layer.op_type for layer in space.layers])
    for op_type in dict.fromkeys(types.tolist()):
        members = np.flatnonzero(types == op_type)
        own_bits = int(space.bits[members, choice[members]].sum())
        fits = np.flatnonzero(space.bits[members].sum(axis=0) <= own_bits)
        if len(members) < 2 or not len(fits):
            continue
        best = int(fits[np.argmax(values[members].sum(axis=0)[fits])])
        loss = float(values[members, choice[members]].sum() - values[members, best].sum())
        saved = own_bits - int(space.bits[members, best].sum())
        schemes = len(np.unique(choice[members]))
        found.append(Sharing(op_type, len(members), schemes, space.labels[best], loss, saved))
    return sorted(found, key=lambda item: item.loss)


def read_names(space: SearchSpace, values: Floats) -> Names:
    """Return what methods, widths and operation types are worth by an explanation's values [L, O]."""
    centred = values - values.mean(axis=1, keepdims=True)
    method_of = [option.label.replace(f"-{option.bits}", "", 1) for option in space.options]
    methods, widths = sorted(set(method_of)), sorted({option.bits for option in space.options})
    columns = np.array(
        [
            [float(own == name) for name in methods] + [float(option.bits == width) for width in widths]
            for own, option in zip(method_of, space.options, strict=True)
        ]
    )
    mean = centred.mean(axis=0)
    effects = np.linalg.lstsq(columns, mean, rcond=None)[0]  # the least norm: what is undetermined is split evenly
    by_method, by_width = effects[: len(methods)], effects[len(methods) :]
    left = mean - columns @ effects
    felt = centred @ mean / max(float(mean @ mean), 1e-300)  # slope of a layer's values on the mean ones
    types = np.array([layer.op_type for layer in space.layers])
    return Names(
        {name: float(e) for name, e in zip(methods, by_method - by_method.mean(), strict=True)},
        {width: float(e) for width, e in zip(widths, by_width - by_width.mean(), strict=True)},
        {name: float(felt[types == name].mean()) for name in dict.fromkeys(types.tolist())},
        float(1 - left @ left / max(float(mean @ mean), 1e-300)),
    )


def say_names(names: Names) -> str:
    """Return the worth of methods, widths and roles as one sentence."""
    methods = ", ".join(f"{name} {value:+.3f}" for name, value in sorted(names.methods.items(), key=lambda m: -m[1]))
    widths = ", ".join(f"{width} bits {value:+.3f}" for width, value in names.widths.items())
    roles = sorted(names.roles.items(), key=lambda item: -item[1])
    felt = ", ".join(f"{name} ×{value:.1f}" for name, value in (*roles[:3], *roles[-1:]))
    return f"Names: in y of the mean layer, methods {methods}; widths {widths}. Felt most and least by {felt}."


def doubts(space: SearchSpace, explained: Attribution, choice: Ints) -> list[Doubt]:
    """Return the layers whose option beats one of no more bits by less than the folds' spread, least sure first."""
    found = []
    for position, now in enumerate(choice):
        others = np.flatnonzero(space.bits[position] <= space.bits[position, now])
        others = others[others != now]
        if not len(others):
            continue
        rival = int(others[np.argmax(explained.values[position, others])])
        gap = float(explained.values[position, now] - explained.values[position, rival])
        spread = float(max(explained.spread[position, now], explained.spread[position, rival]))
        if gap < spread:
            found.append(Doubt(space.layer_names[position], space.labels[now], space.labels[rival], gap, spread))
    return sorted(found, key=lambda item: item.gap - item.spread)


def advice(space: SearchSpace, explained: Attribution, choice: Ints) -> list[str]:
    """Return sentences to act on: where fewer bytes cost least, what can share a scheme, what is not known."""
    return [
        _less(space, explained.values, choice),
        _share(space, explained.values, choice),
        _unsure(space, explained, choice),
    ]


def _less(space: SearchSpace, values: Floats, choice: Ints) -> str:
    savings = cheapest_savings(space, values, choice)
    if not savings:
        return "One byte less: no layer has a smaller option."
    first = savings[0]
    cost = "nothing that the explanation can see" if first.loss <= 0 else f"{first.loss:.4f} of y"
    return (
        f"One byte less: take it from {first.layer}. {describe(first.then)} instead of {describe(first.now)} saves "
        f"{megabytes(first.saved_bits / 8)} and costs {cost}, the least per byte of all layers."
    )


def _share(space: SearchSpace, values: Floats, choice: Ints) -> str:
    mixed = [item for item in shared_schemes(space, values, choice) if item.schemes > 1]
    shared = [item for item in mixed if item.loss <= SHARED]
    if not shared:
        least = f"; the least loss is {mixed[0].loss:.3f} of y, in {mixed[0].op_type}" if mixed else ""
        return f"One scheme for all: no operation type with mixed schemes can share one without loss{least}."
    first = max(shared, key=lambda item: item.layers)
    text = (
        f"One scheme for all: the {first.layers} layers {first.op_type} can all take {describe(first.scheme)} for "
        f"{max(first.loss, 0.0):.3f} of y, in no more bytes"
    )
    if len(shared) > 1:
        text += f"; so can {', '.join(item.op_type for item in shared if item is not first)}"
    return f"{text}. A kernel for one scheme serves them."


def _unsure(space: SearchSpace, explained: Attribution, choice: Ints) -> str:
    unsure = doubts(space, explained, choice)
    if not unsure:
        return (
            "What is not known: nothing that matters here. For every layer all folds agree that its option beats every "
            "other one of no more bits."
        )
    held = np.isin(space.layer_names, [item.layer for item in unsure])
    share = float(space.num_weights[held].sum() / space.num_weights.sum())
    first = unsure[0]
    return (
        f"What is not known: for {len(unsure)} of {len(space.layers)} layers ({percent(share)} of the weights) the "
        f"folds disagree which option of no more bits is best; first {first.layer}, where {describe(first.option)} and "
        f"{describe(first.rival)} lie {first.gap:+.4f} apart with a spread of {first.spread:.4f}. Trials that differ "
        "there would teach most."
    )
