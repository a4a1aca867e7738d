"""The charts of a report: records in, one SVG out. Every chart is drawn from numbers that the run measured."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantdm.metrics.statistics import spread
from quantdm.report.figures import (
    BASELINE,
    FAINT,
    HUES,
    INK,
    MUTED,
    RECIPE,
    ROW,
    SENSITIVITY,
    as_percent,
    chart,
    color,
    describe,
    family,
    legend_above,
    plain_log,
    rows_of,
    tint,
)
from quantdm.schemes import MAX_BITS, Scheme
from quantdm.surrogates import SearchSpace

# Result row -> marker, colour, name beside the point.
MARKS = {
    "uniform-w4": ("s", BASELINE, "uniform, 4 bits"),
    "kmeans-w4": ("s", HUES["kmeans", "channel"], "k-means, 4 bits"),
    "uniform-next-width": ("s", BASELINE, "one scheme everywhere, next width"),
    "least-weight-error": ("^", MUTED, "least weight error"),
    "sensitivity-same-size": ("D", SENSITIVITY, "one-layer sensitivities"),
    "recipe": ("o", RECIPE, "recipe"),
}


def quality_against_bits(
    trials: Sequence[dict[str, Any]],
    candidates: dict[str, dict[str, Any]],
    rows: dict[str, dict[str, Any]],
    *,
    noise: float | None,
    target_bits: float,
    titles: tuple[str, str],
) -> str:
    """Draw FID to full precision against average bits: the search's trials on the left, the final figures on the right.

    The two panels share their axes but not their protocol (number of images and steps), so they stand apart.
    """
    with chart(4.3, "FID to full precision against average bits per weight") as canvas:
        left, right = canvas.axes(1, 2, sharex=True, sharey=True, width_ratios=(1, 1))
        for axes, title in zip((left, right), titles, strict=True):
            axes.set(yscale="log", xlabel="average bits per weight, overhead included", title=title)
            axes.grid(axis="y")
            axes.axvline(target_bits, color=FAINT, lw=0.8, ls=(0, (2, 3)), zorder=0)
        left.set_ylabel("FID to full precision (log scale, lower is better)")
        mixed = [t for t in trials if len(set(t["config"].values())) > 1]
        points = [(t["avg_bits"], max(t["fid_fp"], 1e-9)) for t in mixed]
        left.plot(*_columns(points), "o", ms=3.6, mfc=tint(INK, 0.4), mec="white", mew=0.4, label="sampled mix")
        families: dict[str, str] = {}
        for trial in (t for t in trials if len(set(t["config"].values())) == 1):
            scheme = Scheme.parse(next(iter(trial["config"].values())))
            x, y = trial["avg_bits"], trial["fid_fp"]
            mark = left.plot(x, y, "s", ms=7, color=color(scheme), mec="white", mew=0.6)[0]
            canvas.hover(mark, f"{describe(scheme.label)} everywhere: {x:.3f} bits, fid_fp {y:.4f}")
            left.annotate(str(scheme.bits), (x, y), (6, 3), textcoords="offset points", fontsize=7.5, color=INK)
            families[family(scheme)] = color(scheme.model_copy(update={"bits": MAX_BITS}))
        for name, hue in families.items():
            left.plot([], [], "s", ms=6, color=hue, label=f"{name} everywhere")
        _final_points(canvas, right, candidates, rows)
        if noise:
            right.axhline(noise, color=MUTED, lw=0.8, ls=(0, (4, 3)), zorder=0)
            right.annotate("two full-precision draws of different noise", (0, noise), (4, 3), fontsize=7, color=MUTED,
                           xycoords=("axes fraction", "data"), textcoords="offset points")  # fmt: skip
        plain_log(left.yaxis)
        legend_above(canvas, left, right)
    return canvas.svg


def _final_points(
    canvas: Any, axes: Any, candidates: dict[str, dict[str, Any]], rows: dict[str, dict[str, Any]]
) -> None:
    verified = [(c["avg_bits"], max(c["fid_fp_mean"], 1e-9)) for c in candidates.values()]
    if verified:
        axes.plot(*_columns(verified), "o", ms=5, mfc="none", mec=FAINT, mew=0.9, label="other verified candidate")
    for name, (marker, hue, text) in MARKS.items():
        row = rows.get(name)
        if row is None or not row["fid_fp"] > 0:
            continue
        x, y, sd = row["avg_bits"], row["fid_fp"], row.get("fid_fp_sd")
        chosen = name == "recipe"
        if sd is not None:  # of a single draw there is none
            axes.plot([x, x], [max(y - sd, y / 20), y + sd], color=hue, lw=1.2, zorder=3)
        mark = axes.plot(x, y, marker, ms=9 if chosen else 6.5, color=hue, mec="white", mew=0.8, zorder=4)[0]
        canvas.hover(mark, f"{text}: {x:.3f} bits, fid_fp {spread(y, sd)}")
        axes.annotate(text, (x, y), (9, -3), textcoords="offset points", fontsize=8, color=hue,
                      fontweight="bold" if chosen else "normal", zorder=5)  # fmt: skip


def surrogate_quality(folds: dict[str, list[float]], null: dict[str, float]) -> str:
    """Draw the held-out rank correlation of every surrogate, beside what is known without learning."""
    names = [*folds, *null]
    with chart(0.75 + ROW * len(names), "Held-out rank correlation of the surrogates") as canvas:
        axes = canvas.axes()
        for row, (name, scores) in enumerate(folds.items()):
            mean = float(np.mean(scores))
            axes.plot([min(scores), max(scores)], [row, row], color=tint(RECIPE, 0.35), lw=5, solid_capstyle="round")
            axes.plot(scores, [row] * len(scores), "o", ms=3.5, color=RECIPE, mec="white", mew=0.4)
            mark = axes.plot(mean, row, "|", ms=15, mew=2.4, color=RECIPE)[0]
            canvas.hover(mark, f"{name}: mean {mean:.3f} of {len(scores)} folds")
            axes.annotate(f"{mean:.2f}", (1, row), (8, 0), xycoords=("axes fraction", "data"), va="center",
                          textcoords="offset points", color=RECIPE, fontweight="bold")  # fmt: skip
        for row, (name, score) in enumerate(null.items(), start=len(folds)):
            mark = axes.plot(score, row, "D", ms=6, mfc="white", mec=MUTED, mew=1.2)[0]
            canvas.hover(mark, f"{name}: {score:.3f}, nothing learned")
            axes.annotate(f"{score:.2f}", (1, row), (8, 0), xycoords=("axes fraction", "data"), va="center",
                          textcoords="offset points", color=MUTED)  # fmt: skip
        rows_of(axes, [f"{n} surrogate" for n in folds] + list(null), mono=False)
        low = min([*null.values(), *(s for scores in folds.values() for s in scores)], default=0.0)
        axes.set_xlim(min(low - 0.04, 0.8), 1.0)
        axes.grid(axis="x")
        axes.set_xlabel("Spearman's rank correlation with −log FID (1: ranks every configuration right)")
    return canvas.svg


def methods(space: SearchSpace, values: NDArray[np.float64] | None) -> str:
    """Draw per method the median one-layer error, and the mean learned value, against the bits that it costs."""
    families = list(dict.fromkeys(family(option) for option in space.options))
    cost = space.bits.sum(axis=0) / space.num_weights.sum()
    tables = [("Measured: median one-layer error (log scale)", np.median(space.noise_error, axis=0))]
    tables += [] if values is None else [("Learned: mean value in −log FID per layer", values.mean(axis=0))]
    with chart(2.7, "Methods against the bits they cost") as canvas:
        found = canvas.axes(1, 2, squeeze=False)[0]
        for axes, (title, heights) in zip(found, tables, strict=False):
            for name in families:
                members = [i for i, option in enumerate(space.options) if family(option) == name]
                hue = color(space.options[members[0]].model_copy(update={"bits": MAX_BITS}))
                axes.plot(cost[members], heights[members], "-", color=hue, label=name)
                for i in members:
                    mark = axes.plot(cost[i], heights[i], "o", ms=5, color=hue, mec="white", mew=0.6)[0]
                    canvas.hover(mark, f"{describe(space.labels[i])}: {cost[i]:.3f} bits, {heights[i]:.3g}")
            axes.set(title=title, xlabel="average bits per weight, overhead included")
            axes.grid(axis="y")
        found[0].set_yscale("log")
        as_percent(found[0].yaxis, log=True)
        found[0].legend(loc="upper right")
        for axes in found[len(tables) :]:
            axes.set_visible(False)
    return canvas.svg


def noise_per_step(timesteps: Sequence[float], panels: Sequence[tuple[str, str, Sequence[float]]]) -> str:
    """Draw one small chart per statistic over the sampling steps, from noise (left) to image (right).

    Args:
        timesteps: training timesteps, descending.
        panels: (title, what it says, one value per timestep).
    """
    with chart(1.9 * ((len(panels) + 2) // 3) + 0.2, "Quantization noise per sampling step") as canvas:
        grid = canvas.axes((len(panels) + 2) // 3, min(3, len(panels)), squeeze=False).ravel()
        for axes, (title, meaning, values) in zip(grid, panels, strict=False):
            x = range(len(values))
            axes.axhline(0, color=FAINT, lw=0.7, zorder=0)
            axes.fill_between(x, values, color=tint(RECIPE, 0.12), lw=0)
            axes.plot(x, values, color=RECIPE)
            axes.plot(x, values, "o", ms=3, color=RECIPE, mec="white", mew=0.4)
            axes.set_title(title)
            axes.text(0, 1.01, meaning, transform=axes.transAxes, fontsize=7.5, color=MUTED, va="bottom")
            axes.title.set_position((0, 1.1))
            axes.set_title(title, loc="left", pad=16)
            axes.grid(axis="y")
            every = max(1, len(values) // 5)
            axes.set_xticks(list(x)[::every], [f"{t:.0f}" for t in timesteps][::every])
            axes.margins(x=0.02)
            if not np.any(values):
                axes.set_ylim(-1, 1)
                axes.set_yticks([0])
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        canvas.figure.supxlabel("training timestep, from noise to image", fontsize=8, color=MUTED)
    return canvas.svg


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
