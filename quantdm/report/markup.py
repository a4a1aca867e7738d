"""Small pieces of HTML. Everything that comes from a record passes through `esc`."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import torch

from quantdm.report.records import MADE_BY
from quantdm.report.theme import themed

MAX_TILE = 256  # pixels; larger samples are reduced to that for the page


def esc(value: Any) -> str:
    """Escape any value for HTML text and attributes."""
    return escape(str(value), quote=True)


def dotted(path: str) -> str:
    """Return a dotted path as code that may break after its dots."""
    return f"<code>{esc(path).replace('.', '.<wbr>')}</code>"


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph of plain text."""
    return f'<p class="{kind}">{esc(text)}</p>' if kind else f"<p>{esc(text)}</p>"


def missing(record: str, what: str, *, kind: str = "missing") -> str:
    """Say what a section lacks and which command makes it; of kind "missing extra" if no run makes it by itself."""
    return (
        f'<p class="{kind}">{esc(what)}: <code>{esc(record)}</code> is missing in this run. '
        f"Make it with <code>{esc(MADE_BY[record])}</code> (in capitals: what the run was started with), then write "
        "the report again.</p>"
    )


def figure(content: str, title: str, caption: str, *, kind: str = "chart", narrow: str = "") -> str:
    """Return a figure with a caption that starts with a short title; `narrow` is the chart as a phone shows it."""
    content = themed(content) if kind == "chart" else content
    shown = f'<div class="{kind}{" broad" if narrow else ""}">{content}</div>'
    shown += f'<div class="{kind} slim">{themed(narrow)}</div>' if narrow else ""
    return f"<figure>{shown}<figcaption><b>{esc(title)}</b> {esc(caption)}</figcaption></figure>"


def table(
    head: Sequence[tuple[str, str]],
    rows: Iterable[tuple[str, Sequence[str]]],
    *,
    text_columns: Iterable[int] = (),
) -> str:
    """Return a table.

    Args:
        head: (title, unit or explanation) per column, plain text.
        rows: (class of the row, cells); cells are HTML, the first one heads its row.
        text_columns: columns that are set flush left.
    """
    left = set(text_columns)

    def attribute(column: int) -> str:
        return ' class="text"' if column in left else ""

    titles = "".join(
        f'<th scope="col"{attribute(i)}>{esc(title)}{f"<small>{esc(unit)}</small>" if unit else ""}</th>'
        for i, (title, unit) in enumerate(head)
    )
    body = []
    for kind, cells in rows:
        first, *rest = cells
        tail = "".join(f"<td{attribute(i)}>{cell}</td>" for i, cell in enumerate(rest, start=1))
        body.append(f'<tr{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}><th scope="row">{first}</th>{tail}</tr>')
    # wider than a phone: whoever has no pointer scrolls it with the arrow keys
    label = ", ".join(title for title, _ in head if title)
    start = f'<div class="scroll" role="group" tabindex="0" aria-label="{esc(label)}"><table>'
    return f"{start}<thead><tr>{titles}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


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


def tile_size(images: torch.Tensor) -> tuple[int, int]:
    """Return width and height that images [N, C, H, W] have on the page: at most MAX_TILE."""
    height, width = images.shape[2:]
    scale = min(1.0, MAX_TILE / max(width, height))
    return round(width * scale), round(height * scale)


def strip_png(images: torch.Tensor) -> str:
    """Return uint8 images [N, C, H, W] side by side, one pixel apart, as a data URI."""
    from PIL import Image

    tiles = [Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()) for image in images]
    width, height = tile_size(images)
    if (width, height) != tiles[0].size:
        tiles = [tile.resize((width, height), Image.Resampling.LANCZOS) for tile in tiles]
    sheet = Image.new("RGBA", (len(tiles) * (width + 1) - 1, height))  # what is between them is the page's own colour
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index * (width + 1), 0))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
