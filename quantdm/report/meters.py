"""Rows of bars and dots as plain HTML: readable at any width, in print and by a screen reader."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantdm.report.markup import esc


@dataclass(frozen=True)
class Meter:
    """One row: its name, value and spread (both in one unit of all rows), how the value reads, and a class."""

    name: str
    value: float
    reads: str
    kind: str = ""
    spread: float = 0.0


def bars(rows: Sequence[Meter], label: str) -> str:
    """Draw values as bars from 0."""
    top = max((row.value for row in rows), default=0.0) or 1.0
    return _list(rows, label, lambda row: f'<b style="width:{100 * row.value / top:.2f}%"></b>')


def dots(rows: Sequence[Meter], label: str) -> str:
    """Draw values as dots with their spread, on a common scale from 0."""
    top = max((row.value + row.spread for row in rows), default=0.0) or 1.0

    def mark(row: Meter) -> str:
        low, high = max(row.value - row.spread, 0.0), row.value + row.spread
        whisker = f'<u style="left:{100 * low / top:.2f}%;width:{100 * (high - low) / top:.2f}%"></u>'
        return f'{whisker if row.spread else ""}<i style="left:{100 * row.value / top:.2f}%"></i>'

    return _list(rows, label, mark)


def _list(rows: Sequence[Meter], label: str, mark: Callable[[Meter], str]) -> str:
    items = "".join(
        f'<li class="{row.kind}"><span>{esc(row.name)}</span>'
        f'<span class="track" aria-hidden="true">{mark(row)}</span><span>{esc(row.reads)}</span></li>'
        for row in rows
    )
    return f'<ul class="meters" aria-label="{esc(label)}">{items}</ul>'
