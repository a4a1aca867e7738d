"""What came out: masthead, result table, insights, samples, FID against bits, how it was measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantdm.hub.left import told_left
from quantdm.report import charts, insights
from quantdm.report.figures import describe
from quantdm.report.markup import esc, figure, missing, paragraph, strip_png, table
from quantdm.report.records import Records
from quantdm.report.wording import decimals, guidance, megabytes, percent, plus_minus

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
SHORT_NAMES = {
    "fp": "full precision",
    "uniform-next-width": "best uniform",
    "recipe": "recipe",
    "recipe+a6": "A6",
    "recipe+a6+correction": "A6, corrected",
}


def model_label(model: str) -> str:
    """Return a model's name without the directories of this machine."""
    return (Path(model).name if Path(model).is_absolute() else model) or "a pipeline built in memory"


def masthead(records: Records) -> str:
    """Return the title, the verdict in plain sentences and the key figures."""
    settings, rows = records.settings, records.rows
    model = model_label(settings.model)
    html = f'<p class="kicker">quantdm report</p><h1>{esc(model)} at {settings.target_bits:.2f} bits per weight</h1>'
    if not {"fp", "recipe", "uniform-next-width"} <= set(rows):
        return html + missing("summary.json", "The final figures are not there yet")
    first, *others = insights.headline(model, rows)
    html += f'<p class="lead">{esc(first)}</p>' + "".join(paragraph(text, "also") for text in others)
    fp, recipe, uniform = rows["fp"], rows["recipe"], rows["uniform-next-width"]
    before, after = fp["denoiser_bytes"], recipe["denoiser_bytes"]
    tiles = [
        ("Denoiser", megabytes(after), f"from {megabytes(before)}, {percent(1 - after / before)} less"),
        ("FID to full precision", plus_minus(recipe), f"best uniform: {plus_minus(uniform)}"),
    ]
    if recipe.get("psnr_fp") is not None and uniform.get("psnr_fp") is not None:
        best = f"best uniform: {uniform['psnr_fp']:.1f} dB"
        tiles.append(("PSNR to full precision", f"{recipe['psnr_fp']:.1f} dB", best))
    if recipe.get("fid_real") is not None and fp.get("fid_real") is not None:
        tiles.append(("FID to real images", f"{recipe['fid_real']:.3f}", f"full precision: {fp['fid_real']:.3f}"))
    cells = "".join(f"<div><dt>{esc(n)}</dt><dd>{esc(v)}<small>{esc(s)}</small></dd></div>" for n, v, s in tiles)
    return html + f'<dl class="figures">{cells}</dl>'


def results(records: Records) -> str:
    """Return the result table with its protocol."""
    if records.summary is None:
        return missing("summary.json", "No result table")
    rows = records.summary["rows"]
    real, agreement = "fid_real" in rows[0], "agreement" in rows[0]
    head = [
        ("", ""),
        ("Bits", "per weight"),
        ("Denoiser", "on disk"),
        ("FID to full", "precision"),
        ("PSNR", "dB"),
        *[("FID to real", "images")] * real,
        *[("Agreement", "with request")] * agreement,
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
            f"{row['seconds']:.1f}",
        ]

    html = table(head, [("chosen" if row["name"] == "recipe" else "", cells(row)) for row in rows])
    text = _final_protocol(records.summary) + _blank(rows)
    if records.space is not None and "recipe" in records.rows:
        recipe = records.rows["recipe"]
        rest = recipe["denoiser_bytes"] - round(recipe["avg_bits"] * int(records.space.num_weights.sum()) / 8)
        text += f" Of the recipe's file {megabytes(rest)} are no Linear or Conv weights: biases, norms, tables, header."
        left = told_left(recipe.get("left", {}), recipe["denoiser_bytes"])
        text += "" if left is None else f" {left[0].upper()}{left[1:]}."
    return html + paragraph(text, "caption")


def _final_protocol(summary: dict[str, Any]) -> str:
    protocol, noise, floor = summary.get("protocol", {}), summary.get("fp_noise"), summary.get("fid_floor")
    draws = protocol.get("draws", [])
    over = f"Mean ± standard deviation over {len(draws)} draws" if len(draws) > 1 else "One draw, so without spread,"
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


def samples(records: Records) -> str:
    """Return the sample strips: equal seeds above each other."""
    shown = [name for name in SHORT_NAMES if name in records.samples] or list(records.samples)
    if not shown:
        return missing("samples.safetensors", "No sample grids")
    settings = records.settings.protocol
    conditions = settings.conditions
    count = min(len(records.samples[name]) for name in shown)
    across = len(conditions) if 4 <= len(conditions) <= 12 else 10
    bands = []
    for start in range(0, count, across):
        stop = min(start + across, count)
        strips = []
        for name in shown:
            text = SHORT_NAMES.get(name, name)
            source = strip_png(records.samples[name][start:stop])
            alt = f"{text}: samples {start + 1} to {stop}"
            strips.append(f'<span>{esc(text)}</span><img alt="{esc(alt)}" src="{source}">')
        bands.append(f'<div class="band">{"".join(strips)}</div>')
    asked = ", ".join(map(str, conditions[:10])) + (", …" if len(conditions) > 10 else "") or "nothing"
    steps = (records.summary or {}).get("protocol", {}).get("steps", settings.steps)
    uniform = records.rows.get("uniform-next-width", {}).get("note")
    also = f" Best uniform: {insights.baseline(uniform)}." if uniform else ""
    caption = (
        f"Images above each other share initial noise and condition (asked for in turn: {asked}). The first {count} "
        f"seeds of the first final draw, {steps} steps, guidance {guidance(settings.guidance_scale)}; nothing was "
        f"picked.{also}"
    )
    return figure("".join(bands), "Equal seeds, different weights.", caption, kind="bands")


def frontier(records: Records) -> str:
    """Return FID against bits, with the verified candidates."""
    if not records.trials:
        return missing("trials", "No trials")
    settings = records.settings
    protocol = (records.summary or {}).get("protocol", {})
    selection = records.selection or {}
    candidates, chosen = dict(selection.get("candidates", {})), selection.get("chosen")
    images, steps = protocol.get("images", settings.verify_images), protocol.get("steps", settings.protocol.steps)
    svg = charts.quality_against_bits(
        records.trials,
        {name: c for name, c in candidates.items() if name != chosen or not records.rows},
        records.rows,
        noise=(records.summary or {}).get("fp_noise", {}).get("mean"),
        target_bits=settings.target_bits,
        titles=(
            f"Search: {settings.label_images:,} images, {settings.label_steps} steps per trial",
            f"{'Result' if records.rows else 'Verification'}: {images:,} images, {steps} steps per draw",
        ),
    )
    right = (
        f"candidates verified on up to {settings.verify_draws} draws of {settings.verify_images:,} images are circles"
    )
    if records.rows:
        draws = len(protocol.get("draws", []))
        spreads = f" with one standard deviation over {draws} draws" if draws > 1 else ", one draw each"
        right = f"the recipe (large dot) and the baselines{spreads}; other {right}"
    caption = (
        f"Left: all {len(records.trials)} measured configurations; squares have one scheme everywhere, the number is "
        f"its bit-width. Right: {right}. The dotted line is the target. The panels share their axes but not their "
        f"number of images and steps. Fréchet distance of {settings.protocol.features} features to full-precision "
        "samples of the same noises."
    )
    html = figure(svg, "Quality against size.", caption)
    if not candidates:
        return html + missing("selection.json", "No verified candidates")
    return html + _candidate_table(candidates, chosen)


def _candidate_table(candidates: dict[str, dict[str, Any]], chosen: str | None) -> str:
    rows = []
    for name, c in sorted(candidates.items(), key=lambda item: item[1]["fid_fp_mean"]):
        psnr = c.get("psnr_fp_mean")
        cells = [
            esc(name),
            f"{c['avg_bits']:.3f}",
            spread_cell({"fid_fp": c["fid_fp_mean"], "fid_fp_sd": c.get("fid_fp_sd")}, "fid_fp", 4),
            "–" if psnr is None else f"{psnr:.1f}",
            str(c.get("draws", 2)),
        ]
        rows.append(("chosen" if name == chosen else "", cells))
    head = [("Candidate", ""), ("Bits", "per weight"), ("FID to full precision", ""), ("PSNR", "dB"), ("Draws", "")]
    return f"<details><summary>All {len(rows)} verified candidates</summary>{table(head, rows)}</details>"


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
        ("Sensitivities", f"{s.noise_images} images, draw {base + 1}, float32"),
        (
            "Verification",
            f"up to {s.verify_draws} draws (from {base + 2}) of {s.verify_images:,} images, {s.protocol.steps} steps; "
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


def spread_cell(row: dict[str, Any], key: str, digits: int) -> str:
    """Return a table cell "mean ± sd"."""
    value, sd = row.get(key), row.get(f"{key}_sd") or 0.0
    if value is None:
        return "–"
    if abs(value) < 1e-9:
        return "0"
    if sd > 0:
        return f"{value:.{digits}f} <small>±\u00a0{sd:.{digits}f}</small>"
    return f"{value:.{digits}f}"


def column_decimals(rows: Sequence[dict[str, Any]], key: str) -> int:
    """Return the decimals of a column: two digits of its median spread, at most 4."""
    spreads = [row[f"{key}_sd"] for row in rows if (row.get(f"{key}_sd") or 0.0) > 1e-9]
    return min(4, decimals(float(np.median(spreads)))) if spreads else 4
