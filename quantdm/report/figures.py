"""From a matplotlib figure to one inline SVG: the house style of all charts, and hover titles on their parts."""

import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from quantdm.schemes import MAX_BITS, MIN_BITS, ORIGINAL, Scheme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW = 0.29  # inches per horizontal row
CHARACTER = 0.0075  # width of a tick label's character, as a share of a full-width axis
FLOOR = 1e-6  # errors below this share of the largest are drawn at it
INK, MUTED, FAINT, RULE = "#1c2530", "#667180", "#b9c0c9", "#e3e7ec"
RECIPE, BASELINE, SENSITIVITY = "#0b6e75", "#c46a2b", "#7467b0"
# One hue per way of quantizing; bits make it darker.
HUES = {
    ("uniform", "channel"): "#b8621b",
    ("uniform", "tensor"): "#96703f",
    ("uniform", "group"): "#8a5a3b",
    ("kmeans", "channel"): "#1f5f99",
    ("kmeans", "tensor"): "#6d55a3",
    ("kmeans", "group"): "#33808f",
    ("kmeans", "shared"): "#2b7f6b",
    ("log2", "channel"): "#4f7d3a",
    ("log2", "tensor"): "#6b8f4e",
    ("log2", "group"): "#3d6b52",
}
NAMES = {"uniform": "uniform", "kmeans": "k-means", "log2": "log2"}
WIDTH, NARROW = 10.0, 4.2  # inches, of a page and of a phone; a chart is scaled, so this sets the size of its text
FOLD = 40  # characters of a title or an axis in a row on a phone

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 1.2,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",  # real text in the page's own font: sharp, selectable, small
    "path.simplify": False,
}


class Canvas:
    """A figure being drawn: its axes, and the hover titles given to its parts."""

    def __init__(self, figure: "Figure", *, narrow: bool = False) -> None:
        self.figure, self.narrow = figure, narrow
        self._titles: list[str] = []
        self.svg = ""

    def axes(self, rows: int = 1, columns: int = 1, **grid: Any) -> Any:
        """Return axes as `Figure.subplots` does."""
        return self.figure.subplots(rows, columns, **grid)

    def panels(self, count: int, **grid: Any) -> Any:
        """Return axes beside each other, on a phone below each other."""
        return (
            self.axes(count, 1, squeeze=False)[:, 0] if self.narrow else self.axes(1, count, squeeze=False, **grid)[0]
        )

    def fold(self, text: str) -> str:
        """Break a title into rows on a phone."""
        return textwrap.fill(text, FOLD) if self.narrow else text

    def hover(self, artist: Any, text: str) -> None:
        """Give a drawn part a title that the browser shows under the pointer."""
        artist.set_gid(f"hover-{len(self._titles)}")
        self._titles.append(text)

    def finish(self, label: str) -> str:
        """Return the SVG element: titles put in, ids that nothing refers to taken out, no fixed size."""
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator")))
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
        text = re.sub(r'<g id="hover-(\d+)">', lambda m: f"<g><title>{escape(self._titles[int(m[1])])}</title>", text)
        used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
        text = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", text)
        text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
        text = re.sub(r' xmlns:(?:cc|dc|rdf)="[^"]*"', "", text)
        text = re.sub(r"\n\s*", "\n", text).strip()
        return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


@contextmanager
def chart(height: float, label: str, *, narrow: bool = False) -> Iterator[Canvas]:
    """Yield a canvas in the house style; afterwards `canvas.svg` holds the chart.

    Args:
        height: in inches, at `WIDTH` inches of width, on a phone at `NARROW`.
        label: what one sees, for readers who cannot; it also keeps the ids of several charts on a page apart.
        narrow: for a phone.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": f"{label}{' on a phone' if narrow else ''}"}):
        size = (NARROW if narrow else WIDTH, height)
        canvas = Canvas(Figure(figsize=size, layout="constrained"), narrow=narrow)
        yield canvas
        canvas.svg = canvas.finish(label)


# --------------------------------------------------------------------------------------------------------------- words


def describe(label: str | None) -> str:
    """Say a scheme in words: "k-means per channel, 3 bits"."""
    if label in (None, ORIGINAL.label):
        return "original precision"
    assert label is not None
    scheme = Scheme.parse(label)
    rotated = ", rotated" if scheme.hadamard else ""
    branches = (("low-rank branch", scheme.lowrank), ("LoRA", scheme.lora))
    more = "".join(f", {what} of rank\u00a0{rank}" for what, rank in branches if rank is not None)
    return f"{family(scheme)}, {scheme.bits}\u00a0bits{rotated}{more}"


def family(scheme: Scheme) -> str:
    """Say a scheme without its bits: "k-means per channel", "k-means, shared table"."""
    if scheme == ORIGINAL:
        return "original precision"
    if scheme.granularity == "shared":
        scales = f", scales of {scheme.group_size}" if scheme.group_size else ""
        return f"{NAMES[scheme.method]}, shared table{scales}"
    per = f"group of {scheme.group_size}" if scheme.group_size else scheme.granularity
    return f"{NAMES[scheme.method]} per {per}"


def color(scheme: Scheme | None) -> str:
    """Return the colour of a scheme: hue by method, darker with more bits."""
    if scheme is None or scheme.method == "original":
        return INK
    return tint(HUES[scheme.method, scheme.granularity], bits_strength(scheme.bits))


def bits_strength(bits: int) -> float:
    """Return how strong the colour of a bit-width is: the low widths, where choices are made, are spread most."""
    return 1 - 0.7 * ((MAX_BITS - bits) / (MAX_BITS - MIN_BITS)) ** 3


def tint(hue: str, strength: float) -> str:
    """Return a colour mixed with white."""
    parts = [int(hue[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 - (255 - part) * strength):02x}" for part in parts)


# ---------------------------------------------------------------------------------------------------------------- axes


def plain_log(axis: Any, *, dense: float = 300, most: int | None = None) -> None:
    """Write about `most` ticks of a log axis as plain numbers, at 1, 2 and 5 where it spans less than `dense`."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high / low < dense else (1,), numticks=most))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def as_percent(axis: Any, *, log: bool = False, most: int | None = None) -> None:
    """Write the ticks of an axis as per cent, on a log scale about `most`."""
    from matplotlib.ticker import FuncFormatter

    if log:
        plain_log(axis, dense=60, most=most)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.8f}".rstrip("0").rstrip(".") + " %"))


def rows_of(axes: "Axes", names: Sequence[str], *, mono: bool = True) -> None:
    """Label horizontal rows, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, pad=6)
    axes.spines["left"].set_visible(False)
    for label in axes.get_yticklabels():
        label.set_color(INK)
        if mono:
            label.set_fontfamily("monospace")
            label.set_fontsize(7.5)


def legend_above(canvas: Canvas, *found: Any) -> None:
    entries = [entry for axes in found for entry in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles, labels = [handle for handle, _ in entries], [label for _, label in entries]
    canvas.figure.legend(handles, labels, loc="outside upper left", ncols=2 if canvas.narrow else 4, columnspacing=1.6)


def short_name(name: str, limit: int = 44) -> str:
    """Shorten a dotted path in its middle."""
    return name if len(name) <= limit else f"{name[: limit // 3]}…{name[len(name) - limit + limit // 3 + 1 :]}"
