"""What came out: masthead, result table, insights, samples, FID against bits, how it was measured."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from quantdm.errors import counted
from quantdm.hub.left import told_left
from quantdm.report import insights
from quantdm.report.figures import describe
from quantdm.report.glance import answers, glance
from quantdm.report.markup import esc, missing, paragraph, spread_cell, table
from quantdm.report.records import Records
from quantdm.report.wording import decimals, guidance, megabytes, model_label, plus_minus

ROW_NAMES = {
    "fp": "Full precision",
    "uniform-w4": "Uniform, 4 bits",
    "kmeans-w4": "k-means, 4 bits",
    "uniform-next-width": "One scheme everywhere, next width",
    "least-weight-error": "Least weight error, same size",
    "sensitivity-same-size": "One-layer sensitivities, same size",
    "recipe-untuned": "Recipe before tuning",
    "recipe": "Recipe",
    "recipe+a6": "Recipe, A6",
    "recipe+a6+correction": "Recipe, A6, corrected",
}


def masthead(records: Records) -> str:
    """Return the title and the three answers."""
    settings = records.settings
    bits = f"{settings.target_bits:.2f} bits per weight"
    title = f"<h1>{esc(model_label(settings.model))} <span>at {esc(bits)}</span></h1>"
    return f'<p class="kicker">quantdm report</p>{title}{glance(answers(records))}'


def results(records: Records) -> str:
    """Return the result table with its protocol."""
    if records.summary is None:
        return missing("summary.json", "No result table")
    rows, metrics = records.summary["rows"], _metrics(records.summary)
    real, agreement, counted = "fid_real" in rows[0], "agreement" in rows[0], len(draws_of(rows)) > 1
    head = [
        ("", ""),
        ("Bits", "per weight"),
        ("Denoiser", "on disk"),
        ("FID to full", "precision"),
        ("PSNR", "dB"),
        *[("FID to real", "images")] * real,
        *[("Agreement", "with request")] * agreement,
        *((key, f"{better} is better") for key, better in metrics.items()),
        *[("Draws", "of noise")] * counted,
        ("Time", "s per draw"),
    ]
    fp_digits, real_digits = (column_decimals(rows, key) for key in ("fid_fp", "fid_real"))

    def cells(row: dict[str, Any]) -> list[str]:
        return [
            f"{esc(ROW_NAMES.get(row['name'], row['name']))}<small>{esc(row.get('note') or row['name'])}</small>",
            f"{row['avg_bits']:.3f}",
            esc(megabytes(row["denoiser_bytes"])),
            spread_cell(row, "fid_fp", fp_digits),
            "–" if row.get("psnr_fp") is None else f"{row['psnr_fp']:.1f}",
            *[spread_cell(row, "fid_real", real_digits)] * real,
            *[f"{100 * row.get('agreement', 0):.1f}\u00a0%"] * agreement,
            *(spread_cell(row, key, column_decimals(rows, key)) for key in metrics),
            *[str(row.get("draws", "–"))] * counted,
            f"{row['seconds']:.1f}",
        ]

    html = _headline(records) + table(head, [("chosen" if row["name"] == "recipe" else "", cells(row)) for row in rows])
    text = _final_protocol(records.summary) + _blank(rows) + _beside_weights(records)
    return html + paragraph(text, "caption")


def draws_of(rows: Sequence[dict[str, Any]]) -> list[int]:
    """Return how many draws rows were measured on, every number once; none where a run did not record it."""
    return sorted({row["draws"] for row in rows if "draws" in row})


def _beside_weights(records: Records) -> str:
    """Say what of the recipe's file is no quantized weight."""
    if records.space is None or "recipe" not in records.rows:
        return ""
    recipe = records.rows["recipe"]
    rest = recipe["denoiser_bytes"] - round(recipe["avg_bits"] * int(records.space.num_weights.sum()) / 8)
    text = f" Of the recipe's file {megabytes(rest)} are no Linear or Conv weights: biases, norms, tables, header."
    left = told_left(recipe.get("left", {}), recipe["denoiser_bytes"])
    text += "" if left is None else f" {left[0].upper()}{left[1:]}."
    return text


def _metrics(summary: dict[str, Any]) -> dict[str, str]:
    """Return the metrics by name that have a column of their own: key -> which direction is good."""
    first = summary["rows"][0]
    asked = summary.get("metrics", {}).items()
    return {key: better for key, better in asked if key != "agreement" and first.get(key) is not None}


def _headline(records: Records) -> str:
    if not {"fp", "recipe", "uniform-next-width"} <= set(records.rows):
        return ""
    first, *others = insights.headline(model_label(records.settings.model), records.rows)
    return f'<p class="lead">{esc(first)}</p>' + "".join(map(paragraph, others))


def _final_protocol(summary: dict[str, Any]) -> str:
    protocol, noise, floor = summary.get("protocol", {}), summary.get("fp_noise"), summary.get("fid_floor")
    draws = protocol.get("draws", [])
    over = f"Mean ± standard deviation over {len(draws)} draws" if len(draws) > 1 else "One draw, so without spread,"
    counts = draws_of(summary["rows"])
    if len(counts) > 1:
        over = f"Mean ± standard deviation over up to {max(counts)} draws"
    text = (
        f"{over} of {protocol.get('images', 0):,} images (base seeds "
        f"{', '.join(map(str, draws))}; the search never saw these noises), {protocol.get('steps')} steps, guidance "
        f"{guidance(protocol.get('guidance_scale'))}. FID: {protocol.get('fid')}; features: "
        f"{protocol.get('features')}. Every "
        "row gets the same initial noises, so full precision has distance 0 to itself."
    )
    if noise and noise["mean"] is not None:
        apart = plus_minus({"noise": noise["mean"], "noise_sd": noise["sd"]}, "noise")
        text += f" Two full-precision draws of different noises are {apart} apart."
    if len(counts) > 1:
        text += (
            f" A row that {min(counts)} draws tell clearly from the recipe (99\u00a0% interval over images of equal "
            "noises) is not measured on more; each row says how many it has."
        )
    if floor is not None:
        text += f" Floor of the FID to real images (real training against real test images): {floor:.3f}."
    return text


def _blank(rows: Sequence[dict[str, Any]]) -> str:
    """Say how many images show nothing, row by row; nothing where all do."""
    counts = [(row, row.get("flagged") or 0, row.get("constant") or 0) for row in rows]
    found = [
        f"{ROW_NAMES.get(row['name'], row['name'])}: {flagged} flagged by the safety checker, {constant} others of one "
        "colour only"
        for row, flagged, constant in counts
        if flagged or constant
    ]
    return f" Images that show nothing, here or in full precision, all draws: {'; '.join(found)}." if found else ""


def actions(records: Records) -> str:
    """Return the three insights."""
    if records.space is None:
        return missing("space.json", "Nothing to derive insights from")
    if records.choice is None:
        return missing("recipe.yaml", "No insights without a recipe")
    if records.explanation is None:
        return missing("attribution.json", "No insights without an explanation")
    name, attribution = records.explanation
    lines = []
    for sentence in insights.insights(records.space, records.choice, attribution.values):
        head, _, tail = sentence.partition(": ")
        lines.append(f"<li><strong>{esc(head)}:</strong> {esc(tail)}</li>")
    note = (
        "Derived from one-layer noise errors (relative squared error of the denoiser's output at middle timesteps) and "
        f"the values of the {name} surrogate."
    )
    chosen = (records.selection or {}).get("chosen", name)
    if chosen != name:
        note += f" The recipe itself is the candidate “{chosen}”, the best by measurement."
    return f'<ol class="insights">{"".join(lines)}</ol>' + paragraph(note, "caption")


def by_passes(signs: int | None) -> str:
    """Return how one-layer errors were found, beside measuring them."""
    return "" if signs is None else f"; by backward passes of {signs} random signs where they serve"


def protocol(records: Records) -> str:
    """Return how everything was measured: settings, seeds, versions."""
    s, summary = records.settings, records.summary or {}
    final, base = summary.get("protocol", {}), s.seed * 1000
    items = [
        ("Model", f"{model_label(s.model)}, weights {s.seen.parts[s.seen.denoisers[0]].fingerprint}"),
        ("Target", f"{s.target_bits:g} bits per quantizable weight; codebooks, scales and zero points counted"),
        ("Options per layer", "; ".join(describe(label) for label in s.options)),
        (
            "Search",
            f"{len(records.trials)} of {s.trials} trials of {s.label_images} images, {s.label_steps} steps, seed "
            f"{s.seed}, draw {base}, computed in {s.dtype}",
        ),
        (
            "Sensitivities",
            f"{s.noise_images} images, {s.noise_steps or s.label_steps} steps, draw {base + 1}, float32"
            + by_passes(s.noise_signs),
        ),
        (
            "Verification",
            f"up to {counted(s.verify_draws, 'draw')} (from {base + 2}) of {s.verify_images:,} images, "
            f"{counted(s.steps_of_verification, 'step')}; "
            "a candidate that is clearly worse than the best (99 % interval over images of equal noises) stops",
        ),
    ]
    if final:
        items += [
            (
                "Final rows",
                f"draws {', '.join(map(str, final.get('draws', [])))} of {final.get('images', 0):,} images, "
                f"{final.get('steps')} steps, guidance {guidance(final.get('guidance_scale'))}, scheduler: "
                f"{final.get('scheduler', 'not recorded')}",
            ),
            ("FID", f"{final.get('fid')}; features: {final.get('features')}"),
        ]
    items.append(("Noise", "image i of draw d starts from seed d · 10⁶ + i; all configurations get the same noises"))
    if records.recipe is not None:
        items.append(("Recipe", f"{records.recipe.provenance.source}; {records.recipe.avg_bits} bits per weight"))
    if summary.get("versions"):
        items.append(("Versions", ", ".join(f"{name} {number}" for name, number in summary["versions"].items())))
    return f'<dl class="protocol">{"".join(f"<dt>{esc(k)}</dt><dd>{esc(v)}</dd>" for k, v in items)}</dl>'


def column_decimals(rows: Sequence[dict[str, Any]], key: str) -> int:
    """Return the decimals of a column: two digits of its median spread, at most 4."""
    spreads = [row[f"{key}_sd"] for row in rows if (row.get(f"{key}_sd") or 0.0) > 1e-9]
    return min(4, decimals(float(np.median(spreads)))) if spreads else 4
