"""Progress bars with an estimate, 79 columns wide, on standard error; durations in words."""

import math
import sys
import time
from collections import deque

from tqdm import tqdm

RECENT = 60.0  # seconds of which the rate is taken
AT_ONCE = 0.3  # seconds: what comes in faster when a bar starts was there before


class Bar(tqdm):
    """A bar whose estimate is of what was really done, lately: neither the start of workers counts nor what was there.

    tqdm smooths the rate from the first moment on, so processes that take half a minute to start make an hour of a
    stage of minutes.
    """

    def __init__(self, *args: object, **settings: object) -> None:
        self._marks: deque[tuple[float, float]] = deque()  # when, and how much was done then
        self._began = time.monotonic()
        super().__init__(*args, **settings)  # pyright: ignore

    def update(self, n: float | None = 1) -> bool | None:
        """Count n items."""
        now, shown = time.monotonic(), super().update(n)
        if now - self._began >= AT_ONCE:  # the first mark is the first item's end: what came before is no work
            self._marks.append((now, self.n))
        while len(self._marks) > 2 and now - self._marks[1][0] > RECENT:
            self._marks.popleft()
        return shown

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the end at the recent rate; None before two items are done."""
        if self.total is None or len(self._marks) < 2:
            return None
        (start, first), (last, done) = self._marks[0], self._marks[-1]
        return None if done <= first else max(self.total - self.n, 0) * (last - start) / (done - first)

    @property
    def format_dict(self) -> dict:
        """What the bar is drawn from: tqdm's rate replaced by that of the estimate."""
        found, left = super().format_dict, self.seconds_left
        rate = None if left is None else (self.total - self.n) / left if left > 0 else found["rate"]
        return {**found, "rate": rate}


def bar(total: int, description: str, *, unit: str = "") -> Bar:
    """Return a progress bar; use it as a context manager and call `update`."""
    return Bar(
        total=total,
        desc=f"  {description:<28.28}",
        ncols=79,
        file=sys.stderr,
        bar_format="{desc} {bar} {n_fmt}/{total_fmt} {elapsed}<{remaining}" + (f" {unit}" if unit else ""),
        mininterval=0.5,
        dynamic_ncols=False,
        unit_scale=total >= 10**6,
    )


def duration(seconds: float) -> str:
    """Return a duration in the unit that suits it."""
    units = ((120, 1, "s"), (120 * 60, 60, "min"), (48 * 3600, 3600, "h"), (math.inf, 86400, "days"))
    return next(f"{seconds / unit:.0f} {name}" for below, unit, name in units if seconds < below)
