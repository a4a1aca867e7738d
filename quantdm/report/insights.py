"""What the numbers say, as plain data and plain sentences: aggregation of the records, no new measurement."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantdm.errors import QuantDMError
from quantdm.report.figures import describe
from quantdm.report.wording import megabytes, percent, plus_minus, times
from quantdm.schemes import ORIGINAL
from quantdm.surrogates import SearchSpace

Floats = NDArray[np.float64]
SAME_SIZE = 1e-3  # sizes that differ by less count as equal in words
# Rows of the recipe's size that need no search -> what their knapsack is on; and how a verdict reads.
MIXES = {
    "sensitivity-same-size": "one-layer noise errors",
    "least-weight-error": "weight errors",
}
WORDS = {"better": "better than", "worse": "worse than", "tie": "within noise of", "unknown": "to be compared with"}
AFFORDABLE = 0.05  # share of the weights' size within which the best widenings are summed up


@dataclass(frozen=True)
class Group:
    """Layers of one operation type or block: `members` are positions on the layer axis."""

    name: str
    members: NDArray[np.int64]
    weight_share: float
    avg_bits: float | None
    bit_share: float | None


@dataclass(frozen=True)
class Raise:
    """The best way to give one layer of a recipe more bits: `per_bit` is the value gained per bit spent."""

    layer: str
    op_type: str
    now: str
    then: str
    extra_bits: int
    gain: float
    per_bit: float


# ------------------------------------------------------------------------------------------------------- aggregation


def group_layers(space: SearchSpace, by: str, choice: NDArray[np.int64] | None = None) -> list[Group]:
    """Return the groups of layers by `op_type` or `block`, in data-flow order of their first layer."""
    order = np.argsort([layer.index for layer in space.layers], kind="stable")
    members: dict[str, list[int]] = {}
    for position in order:
        members.setdefault(getattr(space.layers[position], by), []).append(int(position))
    weights = space.num_weights
    bits = None if choice is None else space.gather(space.bits, choice)[0]
    groups = []
    for name, positions in members.items():
        index = np.array(positions)
        groups.append(
            Group(
                name=name,
                members=index,
                weight_share=float(weights[index].sum() / weights.sum()),
                avg_bits=None if bits is None else float(bits[index].sum() / weights[index].sum()),
                bit_share=None if bits is None else float(bits[index].sum() / bits.sum()),
            )
        )
    return groups


def widths(space: SearchSpace) -> list[int]:
    """Return the bit-widths of codes among the options, ascending."""
    return sorted({option.bits for option in space.options if option != ORIGINAL})


def least_error(space: SearchSpace, width: int) -> Floats:
    """Return per layer the least one-layer noise error that any option of a bit-width reaches, [L]."""
    return space.noise_error[:, [i for i, o in enumerate(space.options) if o.bits == width]].min(axis=1)


def width_value(space: SearchSpace, values: Floats) -> Floats:
    """Return per layer what an explanation gains from the narrowest to the widest bit-width (best options), [L]."""
    best = [
        values[:, [i for i, o in enumerate(space.options) if o.bits == width]].max(axis=1)
        for width in (widths(space)[0], widths(space)[-1])
    ]
    return best[1] - best[0]


def one_more_bit(space: SearchSpace, values: Floats, choice: NDArray[np.int64], *, top: int = 10) -> list[Raise]:
    """Return where wider codes buy most: per layer the wider option of most value per bit spent, best layers first.

    Args:
        values: [L, O] of an explanation, larger is better, additive over layers.
        choice: the recipe [L].
        top: at most that many layers; those that gain nothing are left out.
    """
    found = []
    width = np.array([option.bits for option in space.options])
    for position, (layer, now) in enumerate(zip(space.layers, choice, strict=True)):
        extra, gain = space.bits[position] - space.bits[position, now], values[position] - values[position, now]
        larger = np.flatnonzero((width > width[now]) & (extra > 0) & (gain > 0))
        if not len(larger):
            continue
        best = int(larger[np.argmax(gain[larger] / extra[larger])])
        found.append(
            Raise(
                layer=layer.name,
                op_type=layer.op_type,
                now=space.labels[now],
                then=space.labels[best],
                extra_bits=int(extra[best]),
                gain=float(gain[best]),
                per_bit=float(gain[best] / extra[best]),
            )
        )
    return sorted(found, key=lambda item: -item.per_bit)[:top]


# --------------------------------------------------------------------------------------------------------- sentences


def verdict(row: dict[str, Any], other: dict[str, Any], *, figure: str = "fid_fp") -> str:
    """Return "better", "worse" or "tie": a difference counts beyond two standard deviations (of both, combined).

    "unknown" where a figure has no standard deviation, as of a single draw.
    """
    one, two = row.get(f"{figure}_sd"), other.get(f"{figure}_sd")
    if one is None or two is None:
        return "unknown"
    margin = 2 * math.hypot(one, two)
    difference = row[figure] - other[figure]
    if abs(difference) <= margin:
        return "tie"
    return "better" if difference < 0 else "worse"


def headline(model: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return what came out of a run in plain sentences, derived from the result rows and their spread."""
    before, recipe, uniform = rows["fp"], rows["recipe"], rows["uniform-next-width"]
    shrunk = (
        f"The denoiser of {model} shrinks from {megabytes(before['denoiser_bytes'])} to "
        f"{megabytes(recipe['denoiser_bytes'])} ({recipe['avg_bits']:.2f} bits per weight, everything counted)"
    )
    ours, theirs = plus_minus(recipe), plus_minus(uniform)
    against = verdict(recipe, uniform)
    other = f"the best uniform baseline of {size_against(uniform, recipe)} ({baseline(uniform.get('note'))})"
    distance = f"The distance of its images to full precision, fid_fp, is {ours}"
    if against == "better":
        ratio = times(uniform["fid_fp"] / max(recipe["fid_fp"], 1e-12))
        first = f"{shrunk}. {distance}, {ratio} lower than the {theirs} of {other}."
    elif against == "worse":
        first = f"{shrunk}. But the recipe does not win. {distance}, above the {theirs} of {other}."
    elif against == "unknown":
        first = f"{shrunk}. {distance}; that of {other} is {theirs}. One draw does not say which differences count."
    else:
        first = (
            f"{shrunk}. But it is not measurably better than {other}: the distances of the images to full precision, "
            f"fid_fp {ours} and {theirs}, differ by less than two standard deviations."
        )
    sentences = [first]
    mixes = {name: rows[name] for name in MIXES if name in rows}
    if mixes:
        compared = [
            f"{WORDS[verdict(recipe, row)]} a knapsack on {MIXES[name]} (fid_fp {plus_minus(row)})"
            for name, row in mixes.items()
        ]
        sentences.append(f"It is {' and '.join(compared)}.")
    if "recipe+a6" in rows and "recipe+a6+correction" in rows:
        sentences.append(_activations(recipe, rows["recipe+a6"], rows["recipe+a6+correction"]))
    return sentences


def size_against(other: dict[str, Any], recipe: dict[str, Any]) -> str:
    """Say how large a baseline is against the recipe."""
    ratio = other["denoiser_bytes"] / recipe["denoiser_bytes"]
    if abs(ratio - 1) < SAME_SIZE:
        return "the same size"
    return f"{percent(abs(ratio - 1))} {'more' if ratio > 1 else 'fewer'} bytes"


def _activations(recipe: dict[str, Any], a6: dict[str, Any], corrected: dict[str, Any]) -> str:
    """Say what 6-bit activations cost and what the correction of the sampler brings back."""
    word = {
        "better": "lower fid_fp to",
        "worse": "raise fid_fp to",
        "tie": "change nothing measurable, fid_fp",
        "unknown": "have fid_fp",
    }
    text = f"6-bit activations on top {word[verdict(a6, recipe)]} {plus_minus(a6)}"
    if math.isclose(a6["fid_fp"], corrected["fid_fp"], rel_tol=1e-9):
        return f"{text}; no correction of the sampler helped beyond noise, so none is in use."
    word = {
        "better": "lowers it to",
        "worse": "makes it worse,",
        "tie": "changes nothing measurable,",
        "unknown": "has",
    }
    return f"{text}; the correction of the sampler {word[verdict(corrected, a6)]} {plus_minus(corrected)}."


def baseline(note: str | None) -> str:
    """Say in words what a baseline is: "k-means per channel, 3 bits everywhere", "least weight error"."""
    try:
        return f"{describe(note)} everywhere" if note else "uniform"
    except QuantDMError:  # not a scheme: a mix, named by how it was made
        return str(note)


def insights(space: SearchSpace, choice: NDArray[np.int64], values: Floats) -> list[str]:
    """Return three sentences to act on: what to protect, where size is saved, where the next bits belong.

    Args:
        space: sizes and one-layer noise errors.
        choice: the recipe [L].
        values: the explanation it was chosen by [L, O].
    """
    return [_protect(space, choice), _save(space, choice), _spend(space, choice, values)]


def _protect(space: SearchSpace, choice: NDArray[np.int64]) -> str:
    width = widths(space)[0]
    error = least_error(space, width)
    groups = group_layers(space, "op_type", choice)
    worst = max(groups, key=lambda g: float(np.median(error[g.members])))
    typical = max(float(np.median(error)), 1e-12)
    here = float(np.median(error[worst.members]))
    ratio = here / typical
    count = len(worst.members)
    one, median = ("this one layer", "") if count == 1 else ("a single such layer", f" (median of {count})")
    share, bits = percent(worst.weight_share), f"{worst.avg_bits:.1f} bits per weight"
    return (
        f"Protect {worst.name}: taking {one} to {width} bits changes the denoiser's output by {percent(here)} of its "
        f"energy{median}, {times(ratio)} what the median layer costs. "
        + (
            f"It is only {share} of the weights, so pin it high: the {bits} that the recipe gives it cost little."
            if worst.weight_share < 0.1
            else f"It is {share} of the weights and gets {bits}: raise it first if you change the recipe by hand."
        )
    )


def _save(space: SearchSpace, choice: NDArray[np.int64]) -> str:
    width = widths(space)[0]
    narrow = np.array([space.options[o].bits == width for o in choice])
    chosen = space.gather(space.noise_error, choice)[0]
    groups = group_layers(space, "op_type", choice)
    if not narrow.any():
        least = min(groups, key=lambda g: (g.avg_bits or 0.0, -g.weight_share))
        return (
            f"Save in {least.name}: the recipe takes no layer to {width} bits, and with {least.avg_bits:.1f} bits per "
            "weight this operation type is its cheapest. Go lower there first when the model must shrink further."
        )
    share = float(space.num_weights[narrow].sum() / space.num_weights.sum())
    cost = float(chosen[narrow].sum() / max(chosen.sum(), 1e-300))
    by_type = sorted(groups, key=lambda g: -float(space.num_weights[g.members][narrow[g.members]].sum()))
    names = [g.name for g in by_type if narrow[g.members].any()][:2]
    advice = (
        "the first to take down in a recipe written by hand"
        if cost < share
        else "this is where the recipe loses quality, and what a larger target would raise"
    )
    return (
        f"Save in {' and '.join(names)}: most {width}-bit weights are there. The {int(narrow.sum())} of {len(narrow)} "
        f"layers that the recipe takes to {width} bits hold {percent(share)} of the weights and make {percent(cost)} "
        f"of the summed one-layer error: {advice}."
    )


def _spend(space: SearchSpace, choice: NDArray[np.int64], values: Floats) -> str:
    steps = one_more_bit(space, values, choice, top=len(space.layers))
    if not steps:
        return "Spend nothing more: by this explanation no layer gains from a wider option."
    best, total = steps[0], int(space.gather(space.bits, choice).sum())
    affordable, spent, gain = 0, 0, 0.0
    for step in steps:
        if spent + step.extra_bits > AFFORDABLE * total:
            break
        affordable, spent, gain = affordable + 1, spent + step.extra_bits, gain + step.gain
    whole = sum(step.gain for step in steps)
    text = (
        f"Spend the next bits on {best.layer}: going from {describe(best.now)} to {describe(best.then)} costs "
        f"{megabytes(best.extra_bits / 8)} and buys more per bit than widening any other layer."
    )
    if affordable > 1 and whole > 0:
        text += (
            f" Widening the {affordable} layers that pay best makes the weights {percent(spent / total)} larger and "
            f"collects {percent(gain / whole)} of what is left to gain, as the explanation sees it: a target to try."
        )
    return text
