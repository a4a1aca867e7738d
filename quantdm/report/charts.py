"""The charts of a report: records in, one SVG out. Every chart is drawn from numbers that the run measured."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantdm.report.figures import (
    BASELINE,
    FAINT,
    HUES,
    INK,
    MUTED,
    RECIPE,
    RULE,
    SENSITIVITY,
    as_percent,
    bits_strength,
    chart,
    color,
    describe,
    family,
    plain_log,
    rows_of,
    tint,
)
from quantdm.report.insights import Group, group_layers, least_error, percent, widths
from quantdm.schemes import MAX_BITS, Scheme
from quantdm.surrogates import SearchSpace

ROW = 0.29  # inches per horizontal row
CHARACTER = 0.0075  # width of a tick label's character, as a share of a full-width axis
# Result row -> marker, colour, name beside the point.
MARKS = {
    "uniform-w4": ("s", BASELINE, "uniform, 4 bits"),
    "kmeans-w4": ("s", HUES["kmeans", "channel"], "k-means, 4 bits"),
    "uniform-same-size": ("s", BASELINE, "uniform, same size"),
    "sensitivity-same-size": ("D", SENSITIVITY, "one-layer sensitivities"),
    "recipe": ("o", RECIPE, "recipe"),
}


FLOOR = 1e-6  # errors below this share of the largest are drawn at it


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
        _legend_above(canvas, left, right)
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
        x, y, sd = row["avg_bits"], row["fid_fp"], row.get("fid_fp_sd") or 0.0
        chosen = name == "recipe"
        axes.plot([x, x], [max(y - sd, y / 20), y + sd], color=hue, lw=1.2, zorder=3)
        mark = axes.plot(x, y, marker, ms=9 if chosen else 6.5, color=hue, mec="white", mew=0.8, zorder=4)[0]
        canvas.hover(mark, f"{text}: {x:.3f} bits, fid_fp {y:.4f} ± {sd:.4f}")
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


def sensitivity(space: SearchSpace, groups: Sequence[Group], learned: NDArray[np.float64] | None, title: str) -> str:
    """Draw box plots per group of layers: one-layer noise error at every bit-width, and the learned value of bits.

    Args:
        groups: operation types or blocks, drawn in this order.
        learned: per layer the value between the narrowest and the widest option under an explanation, [L], or None.
        title: names the groups.
    """
    panels = 1 if learned is None else 2
    with chart(0.95 + 0.33 * len(groups), f"Sensitivity per {title}") as canvas:
        found = canvas.axes(1, panels, squeeze=False, sharey=True, width_ratios=(1.7, 1)[:panels])[0]
        axes, sizes = found[0], widths(space)
        top = float(least_error(space, sizes[0]).max())
        floor = top * FLOOR
        step = 0.74 / len(sizes)
        for n, width in enumerate(sizes):
            hue = tint(INK, bits_strength(width))
            error = np.maximum(least_error(space, width), floor)
            for row, group in enumerate(groups):
                y = row + (n - (len(sizes) - 1) / 2) * step
                box = _box(axes, error[group.members], y, 0.7 * step, hue)
                median = float(np.median(error[group.members]))
                canvas.hover(
                    box, f"{group.name}, {width} bits: median {percent(median)} of {len(group.members)} layers"
                )
            axes.plot([], [], "s", ms=6, color=hue, label=f"{width} bits")
        axes.set_xscale("log")
        lowest = max(float(least_error(space, sizes[-1]).min()), floor)
        axes.set_xlim(lowest / 1.6, top * 1.6)
        axes.grid(axis="x")
        axes.set_title("Measured: error of the output when one layer is quantized")
        axes.set_xlabel("share of the output's energy (log scale, best method at each bit-width)")
        axes.legend(loc="lower left", ncols=len(sizes), bbox_to_anchor=(0.0, 1.0), borderaxespad=0.0, columnspacing=1.2)
        axes.set_title(axes.get_title("left"), pad=22)
        rows_of(axes, [_short(group.name) for group in groups])
        as_percent(axes.xaxis, log=True)
        if learned is not None:
            other = found[1]
            for row, group in enumerate(groups):
                box = _box(other, learned[group.members], row, 0.42, RECIPE)
                canvas.hover(box, f"{group.name}: median {float(np.median(learned[group.members])):.3g}")
            low, high = min(0.0, float(learned.min())), max(0.0, float(learned.max()))
            pad = 0.04 * max(high - low, 1e-9)
            other.set_xlim(low - pad, high + pad)
            other.axvline(0, color=FAINT, lw=0.8, zorder=0)
            other.grid(axis="x")
            other.set_title(f"Learned: worth of {sizes[-1]} instead of {sizes[0]} bits", pad=22)
            other.set_xlabel("gain in −log FID per layer, as explained")
            other.tick_params(axis="y", length=0)
            other.spines["left"].set_visible(False)
    return canvas.svg


def _box(axes: Any, values: NDArray[np.float64], y: float, height: float, hue: str) -> Any:
    """Draw range, quartiles and median of a few values in one row; single values become a tick."""
    low, q1, median, q3, high = np.quantile(values, (0, 0.25, 0.5, 0.75, 1))
    axes.plot([low, high], [y, y], color=hue, lw=1.0, solid_capstyle="butt")
    box = axes.barh(y, q3 - q1, left=q1, height=height, color=hue, lw=0)[0]
    axes.plot([median, median], [y - height / 2, y + height / 2], color=INK, lw=1.6, solid_capstyle="butt")
    return box


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


def bits_per_layer(space: SearchSpace, choice: NDArray[np.int64]) -> str:
    """Draw the bits of every layer in data-flow order, coloured by scheme, above the noise error that it costs."""
    order = np.argsort([layer.index for layer in space.layers], kind="stable")
    schemes = [space.options[o] for o in choice]
    true = space.gather(space.noise_error, choice)[0]
    error = np.maximum(true, FLOOR * true.max())
    with chart(4.2, "Bits per layer in data-flow order") as canvas:
        top, bottom = canvas.axes(2, 1, sharex=True, height_ratios=(1.5, 1))
        for x, position in enumerate(order):
            layer, scheme = space.layers[position], schemes[position]
            text = f"{layer.name}: {describe(scheme.label)}, {layer.num_weights:,} weights, "
            text += f"one-layer error {percent(float(true[position]))}"
            canvas.hover(top.bar(x, scheme.bits, width=0.82, color=color(scheme), lw=0)[0], text)
            canvas.hover(bottom.plot(x, error[position], "o", ms=4.2, color=color(scheme), mec=MUTED, mew=0.5)[0],
                         text)  # fmt: skip
            bottom.plot([x, x], [error.min() / 2, error[position]], color=RULE, lw=1, zorder=0)
        _stages(top, bottom, [space.layers[position].name for position in order])
        top.set_yticks(range(0, max(s.bits for s in schemes) + 1))
        top.set(ylabel="bits of the codes", xlim=(-0.8, len(order) - 0.2))
        for scheme in sorted(set(schemes), key=lambda s: (family(s), s.bits)):
            top.plot([], [], "s", ms=6, color=color(scheme), label=describe(scheme.label))
        _legend_above(canvas, top)
        bottom.set(yscale="log", ylim=(error.min() / 2, error.max() * 2), ylabel="one-layer error")
        bottom.grid(axis="y")
        as_percent(bottom.yaxis, log=True)
        for axes in (top, bottom):
            axes.tick_params(axis="x", length=0)
    return canvas.svg


def _legend_above(canvas: Any, *found: Any) -> None:
    entries = [entry for axes in found for entry in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles, labels = [handle for handle, _ in entries], [label for _, label in entries]
    canvas.figure.legend(
        handles, labels, loc="outside upper left", ncols=4 if len(found) == 1 else 5, columnspacing=1.6
    )


def _stages(top: Any, bottom: Any, names: Sequence[str]) -> None:
    """Mark the runs of layers that share a numbered parent, and name those that are wide enough."""
    starts: list[tuple[int, str]] = []
    for x, name in enumerate(names):
        if not starts or starts[-1][1] != _stage(name):
            starts.append((x, _stage(name)))
    ticks, numbered = [], set()
    for (start, stage), end in zip(starts, [*(s for s, _ in starts[1:]), len(names)], strict=True):
        if start:
            for axes in (top, bottom):
                axes.axvline(start - 0.5, color=RULE, lw=0.7, zorder=0)
        parent, _, number = stage.rpartition(".")
        for text in (stage, number if parent else ""):
            if text and (end - start) / len(names) > CHARACTER * (len(text) + 1):
                ticks.append(((start + end - 1) / 2, text))
                numbered |= {parent} if text != stage else set()
                break
    bottom.set_xticks([x for x, _ in ticks], [text for _, text in ticks])
    where = f" (numbers: {', '.join(sorted(numbered))})" if numbered else ""
    bottom.set_xlabel(f"layers in data-flow order{where}")


def _stage(name: str) -> str:
    parts = name.split(".")
    return f"{parts[0]}.{parts[1]}" if len(parts) > 1 and parts[1].isdigit() else parts[0]


def shares_per_type(space: SearchSpace, choice: NDArray[np.int64]) -> str:
    """Draw per operation type how its weights are spread over schemes, with its average bits and share of weights."""
    groups = group_layers(space, "op_type", choice)
    used = sorted(set(choice.tolist()), key=lambda o: (family(space.options[o]), space.options[o].bits))
    with chart(0.95 + ROW * len(groups), "Method and bits per operation type") as canvas:
        axes = canvas.axes()
        for row, group in enumerate(groups):
            left, weights = 0.0, space.num_weights[group.members]
            for option in used:
                share = float(weights[choice[group.members] == option].sum() / weights.sum())
                if share:
                    scheme = space.options[option]
                    bar = axes.barh(row, share, left=left, height=0.66, color=color(scheme), lw=0)[0]
                    canvas.hover(bar, f"{group.name}: {percent(share)} of its weights, {describe(scheme.label)}")
                    left += share
            for x, text in (
                (8, f"{group.avg_bits:.2f}"),
                (62, percent(group.weight_share)),
                (116, percent(group.bit_share or 0)),
            ):
                axes.annotate(text, (1, row), (x + 34, 0), xycoords=("axes fraction", "data"), va="center", ha="right",
                              textcoords="offset points", fontsize=8)  # fmt: skip
        for x, text in ((8, "avg bits"), (62, "of weights"), (116, "of bits")):
            axes.annotate(text, (1, -1), (x + 34, 0), xycoords=("axes fraction", "data"), va="center", ha="right",
                          textcoords="offset points", fontsize=7.5, color=MUTED)  # fmt: skip
        for option in used:
            scheme = space.options[option]
            axes.plot([], [], "s", ms=6, color=color(scheme), label=describe(scheme.label))
        _legend_above(canvas, axes)
        axes.set_xlim(0, 1)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        rows_of(axes, [_short(group.name) for group in groups])
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


def _short(name: str, limit: int = 44) -> str:
    """Shorten a dotted path in its middle."""
    return name if len(name) <= limit else f"{name[: limit // 3]}…{name[len(name) - limit + limit // 3 + 1 :]}"
