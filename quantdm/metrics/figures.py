"""Figures that carry their protocol: how many images, steps, seeds, which features, which resizing."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quantdm.metrics.intervals import Interval


@dataclass(frozen=True)
class Figure:
    """One measured number with all that it depends on."""

    metric: str  # its name in the registry
    title: str
    value: float
    better: str
    images: int
    others: int | None = None  # how many images it is compared with
    steps: int | None = None
    seeds: str | None = None
    features: int | None = None  # how many
    resize: str = ""
    ruler: str = ""
    digits: int = 3
    interval: Interval | None = None
    notes: tuple[str, ...] = ()

    @property
    def protocol(self) -> str:
        """Everything that the number depends on, in one line."""
        against = "" if self.others is None else f" against {self.others:,}"
        width = "" if self.features is None else f", {self.features:,} features"
        resize = f", resize: {self.resize}" if self.resize else ""
        told = f"{self.steps or 'unknown'} steps, seeds {self.seeds or 'unknown'}"
        return f"{self.images:,} images{against}, {told}{width}{resize}"

    @property
    def text(self) -> str:
        """The number, with its interval if it has one."""
        found = f"{self.value:.{self.digits}f}"
        if self.interval is None:
            return found
        low, high = (f"{x:.{self.digits}f}" for x in (self.interval.low, self.interval.high))
        return f"{found} [{low}, {high}]"

    def __str__(self) -> str:
        notes = "".join(f"\n    {note}" for note in self.notes)
        return f"{self.title}: {self.text} ({self.better} is better; {self.protocol}){notes}"

    def record(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "protocol": self.protocol}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; bars inside cells are escaped."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], ["---"] * len(header), *lines[1:]]) + "\n"


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return records as CSV; columns in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
