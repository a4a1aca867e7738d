"""Plain SVG plots for the page: two axes, dots, lines, direct labels. The style sheet has the colours, both themes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantdm.report.markup import esc

WIDTH, HEIGHT = 420, 300  # units of the view box: small enough that its text is readable on a phone
LINE = 13.0  # between two labels


@dataclass(frozen=True)
class Scale:
    """From values to units of the view box."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return where a value stands; what lies outside stands at the border."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, max(value, self._least)))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + (self.end - self.start) * min(max(share, 0.0), 1.0)

    @property
    def _least(self) -> float:
        return self.low if self.log else -math.inf

    def ticks(self, count: int = 5) -> list[float]:
        """Return round values inside the scale: decades with 2 and 5 on a short log scale, equal steps else."""
        if self.log:
            subs = (1, 2, 5) if self.high / self.low < 300 else (1,)
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            return [v for p in powers for s in subs if self.low <= (v := s * 10.0**p) <= self.high]
        step = _round_step((self.high - self.low) / max(count, 1))
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _round_step(rough: float) -> float:
    if rough <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * (1 - 1e-9))


def around(values: Sequence[float], *, log: bool = False, zero: bool = False) -> tuple[float, float]:
    """Return limits with some room around values (positive ones on a log scale)."""
    low, high = min(values), max(values)
    if log:
        return low / 1.5, high * 1.5
    low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
    room = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return (low - room if low < 0 or not zero else low), (high + room if high > 0 or not zero else high)


class Plot:
    """One plot: axes first, then marks, then `svg`."""

    def __init__(
        self,
        label: str,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        log_y: bool = False,
        size: tuple[int, int] = (WIDTH, HEIGHT),
        right: float = 12,
    ) -> None:
        self.label, self.size = label, size
        self.x = Scale(*x, 46, size[0] - right)
        self.y = Scale(*y, size[1] - 36, 14, log=log_y)
        self._parts: list[str] = []

    def axes(self, x_title: str, *, x_ticks: Sequence[tuple[float, str]] | None = None, count: int = 5) -> None:
        """Draw both axes: faint lines across, numbers beside them, the name of x below."""
        for value in self.y.ticks(count):
            at = self.y(value)
            self._parts.append(f'<path class="grid" d="M{self.x.start:.1f} {at:.1f}H{self.x.end:.1f}"/>')
            self.text(self.x.start - 6, at + 4, f"{value:.6g}", "tick end")
        found = [(v, f"{v:.6g}") for v in self.x.ticks()] if x_ticks is None else x_ticks
        for value, text in found:
            self.text(self.x(value), self.y.start + 15, text, "tick middle")
        self.text((self.x.start + self.x.end) / 2, self.size[1] - 3, x_title, "tick middle")

    def text(self, x: float, y: float, text: str, kind: str) -> None:
        """Write text at a place in units of the view box."""
        self._parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{esc(text)}</text>')

    def dot(self, x: float, y: float, kind: str, tip: str, *, radius: float = 3, data: str = "") -> None:
        """Draw a value as a dot (a square for kinds that say so) with a tip."""
        at, up = self.x(x), self.y(y)
        if "square" in kind.split():
            shape = f'<rect x="{at - radius:.1f}" y="{up - radius:.1f}" width="{2 * radius}" height="{2 * radius}"'
        else:
            shape = f'<circle cx="{at:.1f}" cy="{up:.1f}" r="{radius}"'
        tag = shape[1:].split()[0]
        self._parts.append(f'{shape} class="{kind}"{data}><title>{esc(tip)}</title></{tag}>')

    def line(self, points: Sequence[tuple[float, float]], kind: str, *, steps: bool = False) -> None:
        """Join values by a line; `steps`: level until the next one."""
        path = ""
        for index, (x, y) in enumerate(points):
            at, up = self.x(x), self.y(y)
            path += f"M{at:.1f} {up:.1f}" if not index else f"H{at:.1f}V{up:.1f}" if steps else f"L{at:.1f} {up:.1f}"
        self._parts.append(f'<path class="{kind}" d="{path}"/>')

    def upright(self, x: float, low: float, high: float, kind: str) -> None:
        """Draw a spread."""
        self._parts.append(f'<path class="{kind}" d="M{self.x(x):.1f} {self.y(low):.1f}V{self.y(high):.1f}"/>')

    def level(self, y: float, kind: str, text: str) -> None:
        """Draw a line across at a value, with its name."""
        self._parts.append(f'<path class="{kind}" d="M{self.x.start:.1f} {self.y(y):.1f}H{self.x.end:.1f}"/>')
        self.text(self.x.start + 4, self.y(y) - 4, text, "tick start")

    def labels(self, entries: Sequence[tuple[float, float, str, str]]) -> None:
        """Write (x, y, text, class) beside values, moved apart where they would touch; left of values far right."""
        last = -math.inf
        for x, y, text, kind in sorted(entries, key=lambda entry: self.y(entry[1])):
            up = max(self.y(y) + 4, last + LINE)
            last, at = up, self.x(x)
            left = at > (self.x.start + self.x.end) / 2
            self.text(at - 9 if left else at + 9, up, text, f"{kind} {'end' if left else 'start'}")

    @property
    def svg(self) -> str:
        """The plot as one SVG element."""
        width, height = self.size
        return (
            f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{esc(self.label)}">'
            f"{''.join(self._parts)}</svg>"
        )
