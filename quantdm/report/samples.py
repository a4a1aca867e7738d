"""Samples of equal seeds: a grid that needs no script, and a stage to compare any two rows by a slider."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantdm.report.insights import baseline
from quantdm.report.markup import esc, figure, missing, strip_png, tile_size
from quantdm.report.records import Records
from quantdm.report.wording import guidance

ROWS = {
    "fp": "full precision",
    "uniform-next-width": "best uniform",
    "recipe": "recipe",
    "recipe+a6": "recipe, A6",
    "recipe+a6+correction": "recipe, A6, corrected",
}
PIXELS = 2_000_000  # of all strips together, so that the page stays a few megabytes
ACROSS, ACROSS_LARGE, LARGE = 5, 2, 128  # images of a strip; fewer where an image is larger than LARGE pixels


def samples(records: Records) -> str:
    """Return the samples of a run: the stage, the grid, and how they were made."""
    shown = {ROWS[name]: records.samples[name] for name in ROWS if name in records.samples}
    shown = shown or dict(records.samples)
    if not shown:
        return missing("samples.safetensors", "No sample grids")
    settings = records.settings.protocol
    conditions = settings.conditions
    asked = ", ".join(map(str, conditions[:10])) + (", …" if len(conditions) > 10 else "") or "nothing"
    steps = (records.summary or {}).get("protocol", {}).get("steps", settings.steps)
    uniform = records.rows.get("uniform-next-width", {}).get("note")
    also = f" Best uniform: {baseline(uniform)}." if uniform else ""
    html, count = compared(shown, conditions)
    caption = (
        f"Images above each other share initial noise and condition (asked for in turn: {asked}). The first {count} "
        f"seeds of the first final draw, {steps} steps, guidance {guidance(settings.guidance_scale)}; nothing was "
        f"picked.{also}"
    )
    return figure(html, "Equal seeds, different weights.", caption, kind="samples")


def compared(rows: Mapping[str, torch.Tensor], conditions: Sequence[Any] = ()) -> tuple[str, int]:
    """Return stage and grid of rows of equal seeds, and how many seeds they show.

    Args:
        rows: name -> uint8 images [N, C, H, W]; the first and the last row are compared first.
        conditions: what the images were asked to show, in turn.
    """
    count = min(len(images) for images in rows.values())
    width, height = tile_size(next(iter(rows.values())))
    across = ACROSS if max(width, height) <= LARGE else ACROSS_LARGE
    count = max(min(count, PIXELS // (width * height * len(rows)) // across * across), min(count, across))
    bands = []
    for start in range(0, count, across):
        stop = min(start + across, count)
        strips = [_strip(name, images[start:stop], start, conditions) for name, images in rows.items()]
        bands.append(f'<div class="band" data-seeds="{start + 1} to {stop}">{"".join(strips)}</div>')
    pixelated = " pixelated" if max(width, height) <= LARGE else ""
    stage = STAGE if len(rows) > 1 else ""
    grid = f'<div class="bands{pixelated}">{"".join(bands)}</div>'
    fold = f"<details open><summary>All {count} seeds as a grid</summary>{grid}</details>"
    return (f"{stage}{fold}" if stage else grid), count


def _strip(name: str, images: torch.Tensor, start: int, conditions: Sequence[Any]) -> str:
    asked = [str(conditions[i % len(conditions)]) for i in range(start, start + len(images))] if conditions else []
    alt = f"{name}: samples {start + 1} to {start + len(images)}" + (f", asked for {'; '.join(asked)}" if asked else "")
    return f'<span>{esc(name)}</span><img alt="{esc(alt)}" data-row="{esc(name)}" src="{strip_png(images)}">'


# Without a script it stays hidden and the grid says everything.
STAGE = """<div class="compare" hidden>
<div class="stage"><span class="tag from"></span><span class="tag to"></span><b class="handle"></b>
<input type="range" min="0" max="100" value="50" aria-label="How much of the left image is shown, in per cent"></div>
<div class="controls"><label>Left <select class="from"></select></label>
<label>Right <select class="to"></select></label>
<button type="button" class="flip">Flip</button>
<button type="button" class="back" aria-label="Previous seeds">←</button>
<button type="button" class="next" aria-label="Next seeds">→</button>
<span class="seeds" aria-live="polite"></span></div>
</div>
"""
