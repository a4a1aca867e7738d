"""The three answers above the fold: how small, how good, why these bits; a sentence and a picture each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantdm.errors import counted
from quantdm.report.figures import FLOOR, RECIPE, bits_strength, tint
from quantdm.report.insights import group_layers, least_error, size_against, verdict, widths
from quantdm.report.markup import esc
from quantdm.report.meters import Meter, bars, dots
from quantdm.report.records import Records
from quantdm.report.theme import themed
from quantdm.report.wording import megabytes, percent, plus_minus, times
from quantdm.schemes import MAX_BITS, MIN_BITS

# Simpler ways to about the recipe's size, and how they are called in a picture.
RIVALS = {
    "uniform-next-width": "best uniform",
    "least-weight-error": "least weight error",
    "sensitivity-same-size": "sensitivities alone",
}
UNIFORM = "uniform-next-width"
MOST_BARS = 160  # layers of the small picture; more are summed up by neighbours
NEAR = 0.25  # bits: types within that of the least count as saving as much


@dataclass(frozen=True)
class Answer:
    """One question with what the records say to it; `picture` is HTML."""

    question: str
    sentence: str
    picture: str


def answers(records: Records) -> list[Answer]:
    """Return the three answers; what a run does not know yet is said, and the next best thing shown."""
    return [how_small(records), how_good(records), why_these_bits(records)]


def glance(found: Sequence[Answer]) -> str:
    """Return answers as HTML, side by side where there is room."""
    cards = "".join(
        f'<div class="answer"><h2>{esc(a.question)}</h2><p>{esc(a.sentence)}</p>{a.picture}</div>' for a in found
    )
    return f'<div class="glance">{cards}</div>'


# ----------------------------------------------------------------------------------------------------------- how small


def how_small(records: Records) -> Answer:
    """Say how small the denoiser gets: on disk where that was measured, else its weights alone."""
    question, rows, space = "How small?", records.rows, records.space
    if {"fp", "recipe"} <= set(rows):
        before, after, bits = rows["fp"]["denoiser_bytes"], rows["recipe"]["denoiser_bytes"], rows["recipe"]["avg_bits"]
        what, rest = "denoiser", f"{bits:.2f} bits per weight, everything counted"
    elif space is not None and records.choice is not None:
        before, after = int(space.num_weights.sum()) * 2, int(space.total_bits(records.choice)[0]) // 8
        what, rest = "quantizable weights", f"{8 * after / before * 2:.2f} bits each; the file is not measured yet"
    else:
        return Answer(question, f"Not known yet: the run aims at {records.settings.target_bits:g} bits per weight.", "")
    sentence = f"{percent(1 - after / before)} less: the {what} shrinks from {megabytes(before)} to {megabytes(after)}"
    meters = [
        Meter("16 bits", before, megabytes(before)),
        Meter("recipe", after, megabytes(after), "recipe"),
    ]
    whole = (
        ""
        if records.export_bytes is None
        else f" With all other parts the export takes {megabytes(records.export_bytes)}."
    )
    return Answer(question, f"{sentence} ({rest}).{whole}", bars(meters, "Size"))


# ------------------------------------------------------------------------------------------------------------ how good


def how_good(records: Records) -> Answer:
    """Say how near the images are to full precision, against the best of the simpler ways to about the same size."""
    question, rows = "How good?", records.rows
    rivals = {name: rows[name] for name in RIVALS if name in rows}
    if "recipe" not in rows or UNIFORM not in rivals:
        return Answer(question, *_not_final(records))
    recipe = rows["recipe"]
    meters = [_meter("recipe", recipe, "recipe"), *(_meter(RIVALS[n], row) for n, row in rivals.items())]
    noise = (records.summary or {}).get("fp_noise") or {}
    if noise.get("mean") is not None:
        meters.append(_meter("other seeds", {"fid_fp": noise["mean"], "fid_fp_sd": noise.get("sd")}, "noise"))
    picture = dots(meters, "Distance of the images to full precision (fid_fp, less is better)")
    return Answer(question, _against(recipe, rivals), picture)


def _meter(name: str, row: dict[str, Any], kind: str = "") -> Meter:
    return Meter(name, row["fid_fp"], plus_minus(row), kind, row.get("fid_fp_sd") or 0.0)


def _against(recipe: dict[str, Any], rivals: dict[str, dict[str, Any]]) -> str:
    """Say the distance, and how it compares with the best uniform scheme and with the best other simple way."""
    said = [_compared(recipe, rivals[UNIFORM], f"the best uniform scheme of {size_against(rivals[UNIFORM], recipe)}")]
    others = {name: row for name, row in rivals.items() if name != UNIFORM}
    if others:
        name = min(others, key=lambda other: others[other]["fid_fp"])
        said.append(_compared(recipe, others[name], RIVALS[name]))
    joined = " and " if said[0].startswith(("no", "worse")) == said[-1].startswith(("no", "worse")) else ", but "
    return f"Images {plus_minus(recipe)} from full precision (fid_fp): {joined.join(said)}."


def _compared(recipe: dict[str, Any], rival: dict[str, Any], name: str) -> str:
    theirs = plus_minus(rival)
    match verdict(recipe, rival):
        case "better":
            ratio = rival["fid_fp"] / max(recipe["fid_fp"], 1e-12)
            return f"{times(ratio)} nearer than {name} ({theirs})"
        case "worse":
            return f"worse than {name} ({theirs})"
        case "tie":
            return f"no better than {name} beyond noise ({theirs})"
        case _:
            return f"not to be told from {name} by one draw ({theirs})"


def _not_final(records: Records) -> tuple[str, str]:
    """Say what a run knows that has no result rows: verified candidates, else its best trial of the size."""
    selection = records.selection or {}
    found = selection.get("candidates", {}).get(selection.get("chosen"))
    if found is not None:
        row = {"fid_fp": found["fid_fp_mean"], "fid_fp_sd": found.get("fid_fp_sd")}
        text = f"Verified at fid_fp {plus_minus(row)} to full precision; not yet measured on noises of its own."
        candidates = sorted(selection["candidates"].items(), key=lambda item: item[1]["fid_fp_mean"])[:4]
        meters = [
            Meter(n, c["fid_fp_mean"], plus_minus({"v": c["fid_fp_mean"], "v_sd": c.get("fid_fp_sd")}, "v"),
                  "recipe" if n == selection["chosen"] else "", c.get("fid_fp_sd") or 0.0)
            for n, c in candidates
        ]  # fmt: skip
        return text, dots(meters, "Verified distance to full precision (fid_fp, less is better)")
    target = records.settings.target_bits
    fitting = [t for t in records.trials if t["avg_bits"] <= target]
    if not fitting:
        return "Not known yet: nothing of this size has been measured.", ""
    best = min(fitting, key=lambda t: t["fid_fp"])
    text = (
        f"Not known yet: no recipe is chosen. The best of {len(fitting)} trials of at most {target:g} bits has fid_fp "
        f"{best['fid_fp']:.3g} to full precision."
    )
    ranked = sorted(fitting, key=lambda t: t["fid_fp"])[:3]
    return text, dots([Meter(f"{t['avg_bits']:.2f} bits", t["fid_fp"], f"{t['fid_fp']:.3g}") for t in ranked],
                      "Best trials of the size: distance to full precision (fid_fp)")  # fmt: skip


# ------------------------------------------------------------------------------------------------------ why these bits


def why_these_bits(records: Records) -> Answer:
    """Say where precision matters most and what the recipe gives there, and where it saves."""
    question, space, choice = "Why these bits?", records.space, records.choice
    if space is None:
        return Answer(question, "Not known yet: no layer has been quantized alone.", "")
    width = widths(space)[0]
    error = least_error(space, width)
    groups = group_layers(space, "op_type", choice)
    worst = max(groups, key=lambda g: float(np.median(error[g.members])))
    here, typical = float(np.median(error[worst.members])), max(float(np.median(error)), 1e-12)
    hurts = (
        f"{worst.name} hurts most: alone at {width} bits it changes the output by {percent(here)}, "
        f"{times(here / typical)} the median layer"
    )
    if choice is None:
        return Answer(question, f"{hurts}. No recipe is chosen yet.", _columns(error, space, f"error at {width} bits"))
    bits = space.gather(space.bits, choice)[0]
    mean = float(bits.sum() / space.num_weights.sum())
    least = min(g.avg_bits or 0.0 for g in groups)
    saved = max((g for g in groups if (g.avg_bits or 0.0) <= least + NEAR), key=lambda g: g.weight_share)
    gets = "so it keeps" if (worst.avg_bits or 0.0) > mean else "yet it gets only"
    sentence = (
        f"{hurts}, {gets} {worst.avg_bits:.1f} bits; {saved.name} ({percent(saved.weight_share)} of the weights) "
        f"manages with {saved.avg_bits:.1f}."
    )
    return Answer(question, sentence, _columns(bits / space.num_weights, space, "bits per weight"))


def _columns(values: np.ndarray, space: Any, unit: str) -> str:
    """Draw one column per layer in data-flow order; with bits, its colour deeper with its height."""
    order = np.argsort([layer.index for layer in space.layers], kind="stable")
    parts = np.array_split(order, min(len(order), MOST_BARS))
    heights = [float(values[part].mean()) for part in parts]
    top, step, drawn, log = max(heights) or 1.0, 300 / len(parts), heights, ""
    if not unit.startswith("bits"):  # errors span decades
        least = max(min(heights), top * FLOOR)
        drawn, log = (
            [top * math.log10(max(h, least) / least * 1.2) / math.log10(top / least * 1.2) for h in heights],
            ", log scale",
        )

    def hue(height: float) -> str:
        strength = bits_strength(min(MAX_BITS, max(MIN_BITS, round(height)))) if unit.startswith("bits") else 0.7
        return tint(RECIPE, 0.35 + 0.65 * strength)

    columns = "".join(
        f'<rect x="{i * step:.2f}" y="{62 - 60 * d / top:.2f}" width="{0.84 * step:.2f}" height="{60 * d / top:.2f}" '
        f'fill="{hue(h)}"><title>{esc(_named(space, part))}: {h:.3g} {esc(unit)}</title></rect>'
        for i, (part, h, d) in enumerate(zip(parts, heights, drawn, strict=True))
    )
    label = f"{unit.capitalize()} of {counted(len(order), 'layer')} from input to output, "
    label += f"{min(heights):.2g} to {top:.2g}{log}"
    return (
        f'<div class="columns" aria-hidden="true"><span>{top:.2g}</span>'
        f'<svg viewBox="0 0 300 62" preserveAspectRatio="none">{themed(columns)}</svg></div>'
        f'<p class="under">{esc(label)}</p>'
    )


def _named(space: Any, part: np.ndarray) -> str:
    first = space.layers[part[0]].name
    return first if len(part) == 1 else f"{first} and {len(part) - 1} more"
