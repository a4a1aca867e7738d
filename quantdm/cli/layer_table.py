"""The layers of an inspection as text and as CSV."""

import csv
import io
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

from quantdm.errors import counted
from quantdm.recipe.tables import TABLE
from quantdm.schemes import ORIGINAL_BITS, Scheme

WIDTH = 79
COSTLY, WASTEFUL = "!", "!!"


def layers_csv(record: dict[str, Any]) -> str:
    """Return the layers of an `inspect_target` record as CSV text."""
    columns = ("name", "kind", "op_type", "block", "shape", "num_weights", "quantizers", "scheme", "bits", "nbytes")
    columns += ("sqnr_db", "activation", "macs")
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "shape": "x".join(map(str, row["shape"]))} for row in record["layers"])
    return out.getvalue()


def layers_text(record: dict[str, Any]) -> str:
    """Return the layers of an `inspect_target` record as lines of at most 79 columns, below the paths they share."""
    rows = record["layers"]
    quantized = any(row["scheme"] for row in rows)
    cells = [_cells(row, quantized) for row in rows]
    head = ("shape", "scheme", "bits", "dB") if quantized else ("shape", "weights")
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    room = max(12, WIDTH - 2 - sum(widths) - 2 * len(widths))

    def line(indent: str, name: str, values: Sequence[str]) -> list[str]:
        columns = "".join(f"  {value:>{width}}" for value, width in zip(values, widths, strict=True))
        label = indent + name
        if len(label) > room + 2:  # its values stand on the next line
            return [*textwrap.wrap(label, WIDTH, subsequent_indent=indent), " " * (room + 2) + columns]
        return [f"{label:<{room + 2}}{columns}"]

    title = textwrap.wrap(f"{record['model']}: {record['denoiser']}", WIDTH)
    lines = [*title, *line("", "layer", head), "-" * WIDTH]
    shared = ""
    for row, values in zip(rows, cells, strict=True):
        path, leaf = _parent(row)
        if path != shared and path:
            lines += textwrap.wrap(path, WIDTH)
        shared = path
        lines += line("  " if path else "", leaf, values)
    return "\n".join([*lines, "-" * WIDTH, *_totals(record, quantized)])


def _cells(row: dict[str, Any], quantized: bool) -> tuple[str, ...]:
    shape = "x".join(map(str, row["shape"])) + (" (2)" if row["quantizers"] == 2 else "")
    if not quantized:
        return shape, f"{row['num_weights']:,}"
    sqnr = row.get("sqnr_db")
    mark = WASTEFUL if row["wasteful"] else COSTLY * row["costly"]
    return shape, row["scheme"] or "original", f"{row['bits']:.3f}{mark}", "-" if sqnr is None else f"{sqnr:.1f}"


def _marks(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what the marks beside layers mean, those that are there."""
    lines = []
    if any(row["quantizers"] == 2 for row in rows):
        lines.append("(2): reads a concatenated long skip, one quantizer per half.")
    if any(row["costly"] and not row["wasteful"] for row in rows):
        told = f"{COSTLY}: tables and scales take more than one bit per weight beyond its scheme's own."
        lines += textwrap.wrap(told, WIDTH, subsequent_indent="   ")
    if any(row["wasteful"] for row in rows):
        lines.append(f"{WASTEFUL}: tables and scales cost more bits than the scheme saves.")
    if any(map(_is_unknown, rows)):
        lines.append("-: no SQNR without the inputs of the layer, on which its scheme is calibrated.")
    return lines


def _is_unknown(row: dict[str, Any]) -> bool:
    """Whether a layer has no SQNR because its scheme is calibrated; an export has none at all."""
    return "sqnr_db" in row and row["scheme"] is not None and Scheme.parse(row["scheme"]).calibration is not None


def _parent(row: dict[str, Any]) -> tuple[str, str]:
    """Split a layer's name before its operation type."""
    name, leaf = row["name"], row["op_type"]
    if not name.endswith(leaf):  # "resnets.conv1" stands for "resnets.0.conv1"
        leaf = leaf.split(".", 1)[-1]
    return name[: -len(leaf) - 1], leaf


def _totals(record: dict[str, Any], quantized: bool) -> list[str]:
    rows, weights = record["layers"], record["num_weights"]
    size = f"{record['weight_bytes'] / 1e6:,.3f} MB" + (" packed" if quantized else f" at {ORIGINAL_BITS} bits")
    layers = sum(row["kind"] != TABLE for row in rows)
    text = f"{counted(layers, 'layer')}, {counted(weights, 'weight')}, {record['avg_bits']:.4f} bits per weight, {size}"
    if record["file_bytes"]:
        text += f"; its files, with biases and norms, have {record['file_bytes'] / 1e6:,.3f} MB"
    cost = f"{record['macs'] / 1e9:,.3f} GMAC, {record['bops'] / 1e9:,.2f} GBOP (MACs x weight bits x activation bits)"
    lines = textwrap.wrap(f"{text}. One call of the denoiser with one sample: {cost}.", WIDTH)
    tables = [row for row in rows if row["kind"] == TABLE]
    if tables:
        size = sum(row["nbytes"] for row in tables) / 1e6
        told = counted(len(tables), "embedding table")
        lines += textwrap.wrap(f"Of these bytes {size:,.3f} MB are {told}, no weights.", WIDTH)
    if record["left"]:
        lines += textwrap.wrap(record["left"], WIDTH)
    rows = [row for row in rows if row["kind"] != TABLE]
    kind = "scheme" if quantized else "op_type"
    shares, numbers = Counter[str](), Counter[str]()
    for row in rows:
        shares[row[kind] or "original"] += row["num_weights"]
        numbers[row[kind] or "original"] += 1
    wide = max(map(len, shares))
    lines += [
        f"  {k:<{wide}}  {100 * n / weights:6.2f} % of the weights, {counted(numbers[k], 'layer')}"
        for k, n in shares.most_common()
    ]
    lines += _marks(rows)
    if len(record["parts"]) > 1:
        lines += ["All parts of the pipeline:", *_parts(record["parts"])]
    if record["provenance"]:
        lines += textwrap.wrap(f"recipe: {record['provenance']}", WIDTH)
    return lines


def _parts(parts: Sequence[dict[str, Any]]) -> list[str]:
    """Return one line per part: name, class, weights, megabytes."""
    wide = min(20, max(len(part["name"]) for part in parts))
    lines = []
    for part in parts:
        weights = "" if part["num_weights"] is None else f"{part['num_weights']:,}"
        size = "" if part["nbytes"] is None else f"{part['nbytes'] / 1e6:,.2f} MB"
        kind = part["class"] if len(part["class"]) <= 27 else part["class"][:24] + "..."
        lines.append(f"  {part['name']:<{wide}} {kind:<27} {weights:>14} {size:>12}".rstrip())
    return lines
