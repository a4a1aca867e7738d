"""Two runs beside each other on one page: sizes, quality, where their bits differ, samples of equal seeds."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantdm.files import MARKUP_COMMENT, check_output, check_replaceable, write_text
from quantdm.pipelines.seen import differences
from quantdm.report.data import DATA_VERSION, report_data
from quantdm.report.figures import describe
from quantdm.report.glance import Answer, glance, how_good, how_small
from quantdm.report.insights import verdict
from quantdm.report.markup import dotted, esc, figure, paragraph, spread_cell, table
from quantdm.report.meters import Meter, bars, dots
from quantdm.report.page import whole_page
from quantdm.report.records import Records, read_records
from quantdm.report.samples import compared
from quantdm.report.wording import megabytes, model_label, percent, plus_minus

COMPARISON_FILE = "comparison.html"
TOLD = ("features", "images", "draws", "steps", "guidance_scale", "fid")  # of a protocol: what has to be equal
SHOWN = ("uniform-next-width", "recipe", "recipe+a6", "recipe+a6+correction")
TOP = 40  # layers of the table


def write_comparison(one: str | Path, two: str | Path, *, out: str | Path = COMPARISON_FILE) -> Path:
    """Write one page about two run directories, atomically, and return its path.

    Figures are set against each other only where both runs measured them by the same protocol; samples only where the
    seeds are equal, which their full-precision images tell. Otherwise the page says why not.

    Raises:
        QuantDMError: no run there, a record that is damaged, or a file at `out` that quantdm did not write.
    """
    records = (read_records(one), read_records(two))
    check_replaceable(check_output(out))
    names = _names(Path(one), Path(two), records)
    title = f"{names[0]} and {names[1]}"
    found = [_sizes(names, records), _quality(names, records), _bits(names, records)]
    header = f'<p class="kicker">quantdm comparison</p><h1>{esc(title)}</h1>{glance(found)}'
    sections = [
        ("samples", "Samples", _samples(names, records)),
        ("result", "Result", _results(names, records)),
        ("layers", "Where the bits differ", _layers(names, records)),
        ("protocol", "How both were measured", _protocols(names, records)),
    ]
    data = {"version": DATA_VERSION, "names": list(names), "runs": [report_data(r) for r in records]}
    path = Path(out)
    write_text(path, whole_page(f"{title}: quantdm comparison", header, sections, "", data), MARKUP_COMMENT)
    return path


Names = tuple[str, str]
Both = tuple[Records, Records]


def _names(one: Path, two: Path, records: Both) -> Names:
    """Return what the runs are called: by model and bits where that tells them apart, else by their folders too."""
    found = [f"{model_label(r.settings.model)} at {r.settings.target_bits:g} bits" for r in records]
    if found[0] == found[1]:
        found = [f"{text} ({path.resolve().name})" for text, path in zip(found, (one, two), strict=True)]
    if found[0] == found[1]:
        found = [f"{text} {letter}" for text, letter in zip(found, "AB", strict=True)]
    return found[0], found[1]


def unlike(records: Both) -> list[str]:
    """Return in what the final protocols of two runs differ; empty: their figures can be compared."""
    one, two = ((r.summary or {}).get("protocol") for r in records)
    if one is None or two is None:
        return ["one of the runs has no final figures"]
    if differences(records[0].settings.seen, records[1].settings.seen):
        return ["they are of different pipelines"]
    return [
        f"{key.replace('_', ' ')}: {one.get(key)} and {two.get(key)}" for key in TOLD if one.get(key) != two.get(key)
    ]


# ------------------------------------------------------------------------------------------------------- three answers


def _sizes(names: Names, records: Both) -> Answer:
    question, rows = "Which is smaller?", [r.rows.get("recipe") for r in records]
    if rows[0] is None or rows[1] is None:
        said = " ".join(f"{name}: {how_small(r).sentence}" for name, r in zip(names, records, strict=True))
        return Answer(question, said, "")
    sizes = [row["denoiser_bytes"] for row in rows if row is not None]
    low = int(np.argmin(sizes))
    text = "Both denoisers have the same size."
    if sizes[0] != sizes[1]:
        text = f"{names[low]}: {megabytes(min(sizes))} against {megabytes(max(sizes))}, "
        text += f"{percent(1 - min(sizes) / max(sizes))} less."
    full = [r.rows["fp"]["denoiser_bytes"] for r in records if "fp" in r.rows][:1]
    meters = [Meter(n, s, megabytes(s), "recipe") for n, s in zip(names, sizes, strict=True)]
    meters = [*(Meter("16 bits", size, megabytes(size)) for size in full), *meters]
    return Answer(question, text, bars(meters, "Size of the denoiser"))


def _quality(names: Names, records: Both) -> Answer:
    question, (one, two) = "Which is better?", [r.rows.get("recipe") for r in records]
    if one is None or two is None:
        said = " ".join(f"{name}: {how_good(r).sentence}" for name, r in zip(names, records, strict=True))
        return Answer(question, said, "")
    meters = [Meter(n, r["fid_fp"], plus_minus(r), "recipe", r.get("fid_fp_sd") or 0.0)
              for n, r in zip(names, (one, two), strict=True)]  # fmt: skip
    picture = dots(meters, "Distance of the images to full precision (fid_fp, less is better)")
    different = unlike(records)
    if different:
        return Answer(question, f"Their figures are not comparable: {'; '.join(different)}.", picture)
    figures = f"fid_fp {plus_minus(one)} and {plus_minus(two)}"
    match verdict(one, two):
        case "better":
            text = f"{names[0]} is nearer to full precision: {figures}."
        case "worse":
            text = f"{names[1]} is nearer to full precision: {figures}."
        case "tie":
            text = f"Neither, beyond noise: {figures}."
        case _:
            text = f"One draw does not tell: {figures}."
    return Answer(question, text, picture)


def _bits(names: Names, records: Both) -> Answer:
    question, shared = "Where do they differ?", _shared(records)
    if not shared:
        return Answer(question, "Their layers cannot be compared: no recipe, or no layer in common.", "")
    moved = [row for row in shared if row["schemes"][0] != row["schemes"][1]]
    weights, all_weights = (sum(row["weights"] for row in rows) for rows in (moved, shared))
    text = f"In {len(moved)} of {len(shared)} layers, {percent(weights / all_weights)} of the weights"
    if moved:
        most = max(moved, key=lambda row: abs(row["bits"][1] - row["bits"][0]) * row["weights"])
        text += f"; most bits moved in {most['name']}, {most['bits'][0]:.2f} against {most['bits'][1]:.2f} per weight"
    means = [sum(row["bits"][i] * row["weights"] for row in shared) / all_weights for i in (0, 1)]
    meters = [Meter(n, m, f"{m:.3f} bits", "recipe") for n, m in zip(names, means, strict=True)]
    return Answer(question, f"{text}.", bars(meters, "Mean bits per weight of the layers in common"))


def _shared(records: Both) -> list[dict[str, Any]]:
    """Return the layers that both recipes have, in data-flow order: weights, bits and schemes of both."""
    tables = []
    for found in records:
        space, choice = found.space, found.choice
        if space is None or choice is None:
            return []
        bits = space.gather(space.bits, choice)[0] / space.num_weights
        tables.append({n: (float(b), space.labels[o]) for n, b, o in zip(space.layer_names, bits, choice, strict=True)})
    space = records[0].space
    assert space is not None
    ordered = [space.layers[i] for i in np.argsort([layer.index for layer in space.layers], kind="stable")]
    return [
        {
            "name": layer.name,
            "weights": layer.num_weights,
            "bits": [t[layer.name][0] for t in tables],
            "schemes": [t[layer.name][1] for t in tables],
        }
        for layer in ordered
        if layer.name in tables[1]
    ]


# ------------------------------------------------------------------------------------------------------------ sections


def _samples(names: Names, records: Both) -> str:
    one, two = (r.samples for r in records)
    if "recipe" not in one or "recipe" not in two:
        return paragraph("One of the runs has no samples.")
    conditions = records[0].settings.protocol.conditions
    if "fp" in one and "fp" in two and torch.equal(one["fp"], two["fp"]):
        rows = {"full precision": one["fp"], names[0]: one["recipe"], names[1]: two["recipe"]}
        html, count = compared(rows, conditions)
        text = f"The first {count} seeds of the first final draw, equal in both runs; nothing was picked."
        return figure(html, "Equal seeds, different weights.", text, kind="samples")
    html = ""
    for name, found, run in zip(names, (one, two), records, strict=True):
        rows = {label: found[key] for key, label in (("fp", "full precision"), ("recipe", "recipe")) if key in found}
        html += f"<h3>{esc(name)}</h3>{compared(rows, run.settings.protocol.conditions)[0]}"
    return paragraph("The runs made their samples of different noises or pipelines: compare each with its own.") + html


def _results(names: Names, records: Both) -> str:
    rows = []
    for name, found in zip(names, records, strict=True):
        for key in SHOWN:
            row = found.rows.get(key)
            if row is not None:
                psnr = row.get("psnr_fp")
                cells = [
                    f"{esc(name)}<small>{esc(key)}: {esc(row.get('note') or '')}</small>",
                    f"{row['avg_bits']:.3f}",
                    esc(megabytes(row["denoiser_bytes"])),
                    spread_cell(row, "fid_fp", 4),
                    "–" if psnr is None else f"{psnr:.1f}",
                ]
                rows.append(("chosen" if key == "recipe" else "", cells))
    if not rows:
        return paragraph("Neither run has final figures yet.")
    different = unlike(records)
    text = "Both were measured by the same protocol, on the same noises."
    if different:
        text = f"Not comparable across the runs: {'; '.join(different)}."
    head = [("Run", "row"), ("Bits", "per weight"), ("Denoiser", "on disk"), ("FID to full", "precision")]
    head.append(("PSNR", "dB"))
    return paragraph(text) + table(head, rows)


def _layers(names: Names, records: Both) -> str:
    moved = [row for row in _shared(records) if row["schemes"][0] != row["schemes"][1]]
    if not moved:
        return paragraph("No layer of both recipes differs, or one run has no recipe.")
    moved.sort(key=lambda row: -abs(row["bits"][1] - row["bits"][0]) * row["weights"])
    rows = [
        ("", [dotted(row["name"]), f"{row['weights']:,}", esc(describe(row["schemes"][0])),
              esc(describe(row["schemes"][1])), f"{row['bits'][1] - row['bits'][0]:+.2f}"])
        for row in moved[:TOP]
    ]  # fmt: skip
    head = [("Layer", ""), ("Weights", ""), (names[0], ""), (names[1], ""), ("Bits", "the second more")]
    rest = f" {TOP} of {len(moved)} are shown." if len(moved) > TOP else ""
    return table(head, rows, text_columns=(2, 3)) + paragraph(f"Most moved bits first.{rest}", "caption")


def _protocols(names: Names, records: Both) -> str:
    protocols = [(r.summary or {}).get("protocol", {}) for r in records]
    rows = [("", [esc(key.replace("_", " ")), *(esc(p.get(key, "–")) for p in protocols)]) for key in TOLD]
    settings = [
        ("trials", [len(r.trials) for r in records]),
        ("target bits", [r.settings.target_bits for r in records]),
    ]
    rows += [("", [name, *map(esc, values)]) for name, values in settings]
    rows.append(("", ["recipe", *(esc(r.recipe.provenance.source if r.recipe else "–") for r in records)]))
    return table([("Setting", ""), (names[0], ""), (names[1], "")], rows, text_columns=(1, 2))
