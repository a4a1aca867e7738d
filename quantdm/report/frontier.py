"""Quality against size: every trial and its front, other sizes to choose from (predicted), the final figures beside."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from quantdm.errors import counted
from quantdm.metrics.statistics import spread
from quantdm.report.charts import MARKS
from quantdm.report.figures import describe
from quantdm.report.markup import esc, missing, paragraph, spread_cell, table
from quantdm.report.plot import Plot, around
from quantdm.report.records import Records
from quantdm.report.sections import draws_of
from quantdm.report.sizes import Size, front, other_sizes, read_values
from quantdm.report.wording import megabytes
from quantdm.runs.resize import SENSITIVITY
from quantdm.schemes import Scheme

LEAST = 1e-9  # distances are drawn on a log scale
X_TITLE = "bits per weight, all counted"


def frontier(records: Records) -> str:
    """Return the plots, the choice of another size, and the verified candidates."""
    if not records.trials:
        return missing("trials", "No trials")
    settings, selection = records.settings, records.selection or {}
    candidates, chosen = dict(selection.get("candidates", {})), selection.get("chosen")
    sizes = other_sizes(records)
    searched = _figure(
        _search_plot(records, sizes),
        f"Search: {len(records.trials)} trials",
        f"Every configuration that was measured ({settings.label_images:,} images, "
        f"{counted(settings.label_steps, 'step')} each); "
        "squares have one scheme everywhere (the number: bits). The line is the best that was measured at each size"
        + (", the open circles are predicted, not measured." if sizes else "."),
    )
    final = _measured(records, candidates, chosen)
    note = (
        f"Fréchet distance of {settings.protocol.features} features to full-precision samples of the same noises, log "
        "scale, lower is better. The dotted line is the target."
    )
    html = f'<div class="pair">{searched}{final}</div>' + paragraph(note, "caption") + _choose(records, sizes)
    if not candidates:
        return html + missing("selection.json", "No verified candidates")
    return html + _candidate_table(candidates, chosen, counted(settings.steps_of_verification, "step"))


def _measured(records: Records, candidates: dict[str, dict[str, Any]], chosen: str | None) -> str:
    """Return the figure of the result rows, with the candidates where those had as many steps; else of these alone."""
    settings, rows = records.settings, records.rows
    steps = settings.steps_of_verification
    alike = steps == settings.protocol.steps  # errors weigh more in fewer steps: another scale
    others = {name: c for name, c in candidates.items() if not rows or (alike and name != chosen)}
    if not others and not rows:
        return ""
    verified = f"verified on up to {settings.verify_draws} draws of {settings.verify_images:,} images"
    if not rows:
        title = f"Verification: {settings.verify_images:,} images, {counted(steps, 'step')}"
        return _figure(_final_plot(records, others), title, f"Circles are candidates, {verified}.")
    protocol = (records.summary or {}).get("protocol", {})
    images, steps = protocol.get("images", settings.verify_images), protocol.get("steps", settings.protocol.steps)
    counts = draws_of(list(rows.values())) or [len(protocol.get("draws", []))]
    draws = " or ".join(map(str, counts))
    spreads = f"one standard deviation over {draws} draws" if max(counts) > 1 else "one draw, so no spread"
    circles = f"; circles are candidates {verified}" if others else ""
    return _figure(
        _final_plot(records, others),
        f"Result: {images:,} images, {steps} steps",
        f"The recipe and the baselines on noises of their own ({spreads}){circles}. Another protocol than the "
        "search, so another picture.",
    )


def _figure(svg: str, title: str, caption: str) -> str:
    return f"<figure><h3>{esc(title)}</h3>{svg}<figcaption>{esc(caption)}</figcaption></figure>"


# --------------------------------------------------------------------------------------------------------------- plots


def _search_plot(records: Records, sizes: Sequence[Size]) -> str:
    trials, target = records.trials, records.settings.target_bits
    points = np.array([(t["avg_bits"], max(t["fid_fp"], LEAST)) for t in trials])
    xs = [*points[:, 0], target, *(s.bits for s in sizes)]
    plot = Plot(
        f"{len(trials)} trials: distance to full precision against bits per weight",
        around(xs), around([*points[:, 1], *(s.fid for s in sizes)], log=True), log_y=True,
    )  # fmt: skip
    plot.axes(X_TITLE)
    plot.upright(target, plot.y.low, plot.y.high, "target")
    numbered: set[int] = set()
    for trial in sorted(trials, key=lambda t: t["fid_fp"]):
        kinds = set(trial["config"].values())
        x, y = trial["avg_bits"], max(trial["fid_fp"], LEAST)
        one = next(iter(kinds)) if len(kinds) == 1 else None
        scheme = None if one is None else Scheme.parse(one)
        if scheme is None:
            plot.dot(x, y, "trial", f"trial: {x:.3f} bits, fid_fp {y:.4g}", radius=2.6)
            continue
        plot.dot(x, y, "trial square", f"{describe(one)} everywhere: {x:.3f} bits, fid_fp {y:.4g}", radius=3.5)
        if scheme.bits not in numbered:  # the best of each width
            plot.text(plot.x(x) + 6, plot.y(y) - 4, str(scheme.bits), "tick")
        numbered.add(scheme.bits)
    plot.line(front(points), "front", steps=True)
    if sizes:
        plot.line([(s.bits, s.fid) for s in sizes], "predicted")
    for index, size in enumerate(sizes):
        tip = (
            f"predicted, not measured: {size.bits:.3f} bits, fid_fp {size.fid:.3g} ({size.low:.3g} to {size.high:.3g})"
        )
        plot.dot(size.bits, size.fid, "size", tip, radius=3.2, data=f' data-size="{index}"')
    _mark_recipe(plot, records)
    return plot.svg


def _mark_recipe(plot: Plot, records: Records) -> None:
    """Mark the chosen recipe: as it was measured in the search, else as it is predicted."""
    if records.choice is None or records.space is None:
        return
    bits = float(records.space.avg_bits(records.choice)[0])
    labels = records.space.config(records.choice).to_labels()
    same = next((t["fid_fp"] for t in records.trials if t["config"] == labels), None)
    reading = read_values(records)
    if same is None and reading is not None:
        fid, word = reading.fid(records.choice), "predicted here"
    elif same is not None:
        fid, word = same, "as measured here"
    else:
        return
    plot.dot(bits, max(fid, LEAST), "chosen", f"the recipe, {word}: {bits:.3f} bits, fid_fp {fid:.3g}", radius=5.5)
    plot.labels([(bits, max(fid, LEAST), f"recipe, {word}", "strong")])


def _final_plot(records: Records, candidates: dict[str, dict[str, Any]]) -> str:
    rows = {name: records.rows[name] for name in MARKS if records.rows.get(name, {}).get("fid_fp", 0.0) > 0}
    noise = ((records.summary or {}).get("fp_noise") or {}).get("mean")
    verified = [(name, c["avg_bits"], max(c["fid_fp_mean"], LEAST)) for name, c in candidates.items()]
    reach = [v for row in rows.values() for v in _reach(row)]
    plot = Plot(
        "Result: distance to full precision against bits per weight",
        around([*(x for _, x, _ in verified), *(r["avg_bits"] for r in rows.values()), records.settings.target_bits]),
        around([*(y for _, _, y in verified), *reach, *([noise] if noise else [])], log=True),
        log_y=True,
    )
    plot.axes(X_TITLE)
    plot.upright(records.settings.target_bits, plot.y.low, plot.y.high, "target")
    if noise:
        plot.level(noise, "target", "two draws of full precision")
    for name, x, y in verified:
        plot.dot(x, y, "candidate", f"candidate “{name}”: {x:.3f} bits, fid_fp {y:.4g}", radius=3.2)
    for name, row in rows.items():
        kind, x = ("chosen" if name == "recipe" else "rival"), row["avg_bits"]
        low, high = _reach(row)
        plot.upright(x, low, high, f"spread {kind}")
        over = f", {counted(row['draws'], 'draw')}" if "draws" in row else ""
        tip = f"{MARKS[name]}: {x:.3f} bits, fid_fp {spread(row['fid_fp'], row.get('fid_fp_sd'))}{over}"
        plot.dot(x, row["fid_fp"], kind, tip, radius=5.5 if name == "recipe" else 4)
    plot.labels(
        [(r["avg_bits"], r["fid_fp"], MARKS[n], "strong" if n == "recipe" else "name") for n, r in rows.items()]
    )
    return plot.svg


def _reach(row: dict[str, Any]) -> tuple[float, float]:
    mean, sd = row["fid_fp"], row.get("fid_fp_sd") or 0.0
    return max(mean - sd, mean / 5), mean + sd


# --------------------------------------------------------------------------------------------------------- other sizes


def _choose(records: Records, sizes: Sequence[Size]) -> str:
    """Return the slider over predicted sizes (it needs the script) and the same as a table (it does not)."""
    reading = read_values(records)
    if not sizes or reading is None:
        return ""
    command = f"quantdm select --run-dir RUN_DIR --by {reading.name} --target-bits {{bits}} -o recipe.yaml"
    entries = [
        {
            "says": f"{s.bits:.2f} bits per weight, {megabytes(s.denoiser_bytes)}: predicted fid_fp {s.fid:.2g}, "
            f"as the trials scatter {s.low:.2g} to {s.high:.2g}",
            "command": command.format(bits=f"{s.bits:.4f}"),
        }
        for s in sizes
    ]
    whole = "recipe" in records.rows
    near = min(range(len(sizes)), key=lambda i: abs(sizes[i].bits - records.settings.target_bits))
    slider = (
        f'<div class="sizes" hidden data-sizes=\'{esc(json.dumps(entries))}\'><label for="size">Another size</label>'
        f'<input type="range" id="size" min="0" max="{len(sizes) - 1}" value="{near}">'
        '<p class="says" aria-live="polite"></p><p class="command"><code></code></p></div>'
    )
    rows = [
        ("", [f"{s.bits:.3f}", esc(megabytes(s.denoiser_bytes)), f"{s.fid:.3g}", f"{s.low:.3g} to {s.high:.3g}"])
        for s in sizes
    ]
    head = [
        ("Bits", "per weight"),
        ("Denoiser", "on disk") if whole else ("Weights", "quantized, alone"),
        ("FID to full", "predicted"),
        ("Range", "trials scatter"),
    ]
    by = "one-layer sensitivities" if reading.name == SENSITIVITY else f"the {reading.name} surrogate's values"
    note = (
        f"Predicted, not measured: the best recipe of each size by {by}, which of all explanations predict the trials "
        "best, read as fid_fp by a curve through the trials that never falls. The range is two standard deviations of "
        "trials of such totals that the curve was not fitted to. What is best by a prediction is often a little worse "
        "than predicted."
    )
    listing = f"<details><summary>All {len(sizes)} predicted sizes</summary>{table(head, rows)}</details>"
    return f"<h3>Other sizes, predicted</h3>{slider}{paragraph(note, 'caption')}{listing}"


def _candidate_table(candidates: dict[str, dict[str, Any]], chosen: str | None, steps: str) -> str:
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
    return f"<details><summary>All {len(rows)} verified candidates, {steps}</summary>{table(head, rows)}</details>"
