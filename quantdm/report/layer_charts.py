"""Charts with one mark per layer: sensitivities, bits, shares."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantdm.errors import counted
from quantdm.report.figures import (
    CHARACTER,
    FAINT,
    FLOOR,
    INK,
    MUTED,
    NARROW,
    RECIPE,
    ROW,
    RULE,
    WIDTH,
    Canvas,
    as_percent,
    bits_strength,
    chart,
    color,
    describe,
    family,
    legend_above,
    rows_of,
    short_name,
    tint,
)
from quantdm.report.insights import Group, group_layers, least_error, widths
from quantdm.report.wording import percent
from quantdm.surrogates import SearchSpace

LONG, SHORT = 44, 22  # characters of a name on a page and on a phone
COLUMNS = ((8, "avg bits"), (62, "of weights"), (116, "of bits"))


def sensitivity(
    space: SearchSpace,
    groups: Sequence[Group],
    learned: NDArray[np.float64] | None,
    title: str,
    *,
    narrow: bool = False,
) -> str:
    """Draw box plots per group of layers: one-layer noise error at every bit-width, and the learned value of bits.

    Args:
        groups: operation types or blocks, drawn in this order.
        learned: per layer the value between the narrowest and the widest option under an explanation, [L], or None.
        title: names the groups.
        narrow: for a phone: panels below each other.
    """
    panels = 1 if learned is None else 2
    names = [short_name(group.name, SHORT if narrow else LONG) for group in groups]
    height = 0.95 + 0.33 * len(groups)
    with chart(panels * (height + 0.5) if narrow else height, f"Sensitivity per {title}", narrow=narrow) as canvas:
        found = canvas.panels(panels, sharey=True, width_ratios=(1.7, 1)[:panels])
        _measured_panel(canvas, found[0], space, groups)
        rows_of(found[0], names)
        as_percent(found[0].xaxis, log=True, most=4 if narrow else None)
        if learned is not None:
            _learned_panel(canvas, found[1], widths(space), groups, learned)
            if narrow:
                rows_of(found[1], names)
    return canvas.svg


def _measured_panel(canvas: Canvas, axes: Any, space: SearchSpace, groups: Sequence[Group]) -> None:
    sizes = widths(space)
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
                box, f"{group.name}, {width} bits: median {percent(median)} of {counted(len(group.members), 'layer')}"
            )
        axes.plot([], [], "s", ms=6, color=hue, label=f"{width} bits")
    axes.set_xscale("log")
    lowest = max(float(least_error(space, sizes[-1]).min()), floor)
    axes.set_xlim(lowest / 1.6, top * 1.6)
    axes.grid(axis="x")
    axes.set_xlabel(canvas.fold("share of the output's energy (log scale, best method at each bit-width)"))
    columns = min(len(sizes), 4) if canvas.narrow else len(sizes)
    axes.legend(loc="lower left", ncols=columns, bbox_to_anchor=(0.0, 1.0), borderaxespad=0.0, columnspacing=1.2)
    title = canvas.fold("Measured: error of the output when one layer is quantized")
    axes.set_title(title, pad=10 + 12 * -(-len(sizes) // columns))


def _learned_panel(
    canvas: Canvas, axes: Any, sizes: Sequence[int], groups: Sequence[Group], learned: NDArray[np.float64]
) -> None:
    for row, group in enumerate(groups):
        box = _box(axes, learned[group.members], row, 0.42, RECIPE)
        canvas.hover(box, f"{group.name}: median {float(np.median(learned[group.members])):.3g}")
    low, high = min(0.0, float(learned.min())), max(0.0, float(learned.max()))
    pad = 0.04 * max(high - low, 1e-9)
    axes.set_xlim(low - pad, high + pad)
    axes.axvline(0, color=FAINT, lw=0.8, zorder=0)
    axes.grid(axis="x")
    axes.set_title(f"Learned: worth of {sizes[-1]} instead of {sizes[0]} bits", pad=8 if canvas.narrow else 22)
    axes.set_xlabel("gain in −log FID per layer, as explained")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _box(axes: Any, values: NDArray[np.float64], y: float, height: float, hue: str) -> Any:
    """Draw range, quartiles and median of a few values in one row; single values become a tick."""
    low, q1, median, q3, high = np.quantile(values, (0, 0.25, 0.5, 0.75, 1))
    axes.plot([low, high], [y, y], color=hue, lw=1.0, solid_capstyle="butt")
    box = axes.barh(y, q3 - q1, left=q1, height=height, color=hue, lw=0)[0]
    axes.plot([median, median], [y - height / 2, y + height / 2], color=INK, lw=1.6, solid_capstyle="butt")
    return box


def bits_per_layer(space: SearchSpace, choice: NDArray[np.int64], *, narrow: bool = False) -> str:
    """Draw the bits of every layer in data-flow order, coloured by scheme, above the noise error that it costs."""
    order = np.argsort([layer.index for layer in space.layers], kind="stable")
    schemes = [space.options[o] for o in choice]
    true = space.gather(space.noise_error, choice)[0]
    error = np.maximum(true, FLOOR * true.max())
    mark = 2.6 if narrow else 4.2
    with chart(4.2, "Bits per layer in data-flow order", narrow=narrow) as canvas:
        top, bottom = canvas.axes(2, 1, sharex=True, height_ratios=(1.5, 1))
        for x, position in enumerate(order):
            layer, scheme = space.layers[position], schemes[position]
            text = f"{layer.name}: {describe(scheme.label)}, {layer.num_weights:,} weights, "
            text += f"one-layer error {percent(float(true[position]))}"
            canvas.hover(top.bar(x, scheme.bits, width=0.82, color=color(scheme), lw=0)[0], text)
            dot = bottom.plot(x, error[position], "o", ms=mark, color=color(scheme), mec=MUTED, mew=0.5)[0]
            canvas.hover(dot, text)
            bottom.plot([x, x], [error.min() / 2, error[position]], color=RULE, lw=1, zorder=0)
        _stages(canvas, top, bottom, [space.layers[position].name for position in order])
        top.set_yticks(range(0, max(s.bits for s in schemes) + 1))
        top.set(ylabel="bits of the codes", xlim=(-0.8, len(order) - 0.2))
        for scheme in sorted(set(schemes), key=lambda s: (family(s), s.bits)):
            top.plot([], [], "s", ms=6, color=color(scheme), label=describe(scheme.label))
        legend_above(canvas, top)
        bottom.set(yscale="log", ylim=(error.min() / 2, error.max() * 2), ylabel="one-layer error")
        bottom.grid(axis="y")
        as_percent(bottom.yaxis, log=True)
        for axes in (top, bottom):
            axes.tick_params(axis="x", length=0)
    return canvas.svg


def _stages(canvas: Canvas, top: Any, bottom: Any, names: Sequence[str]) -> None:
    """Mark the runs of layers that share a numbered parent, and name those that are wide enough."""
    starts: list[tuple[int, str]] = []
    character = CHARACTER * (WIDTH / NARROW if canvas.narrow else 1)
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
            if text and (end - start) / len(names) > character * (len(text) + 1):
                ticks.append(((start + end - 1) / 2, text))
                numbered |= {parent} if text != stage else set()
                break
    bottom.set_xticks([x for x, _ in ticks], [text for _, text in ticks])
    where = f" (numbers: {', '.join(sorted(numbered))})" if numbered else ""
    bottom.set_xlabel(canvas.fold(f"layers in data-flow order{where}"))


def _stage(name: str) -> str:
    parts = name.split(".")
    return f"{parts[0]}.{parts[1]}" if len(parts) > 1 and parts[1].isdigit() else parts[0]


def shares_per_type(space: SearchSpace, choice: NDArray[np.int64], *, narrow: bool = False) -> str:
    """Draw per operation type how its weights are spread over schemes, with its average bits and share of weights."""
    groups = group_layers(space, "op_type", choice)
    used = sorted(set(choice.tolist()), key=lambda o: (family(space.options[o]), space.options[o].bits))
    legend = 0.2 * -(-len(used) // 2) if narrow else 0.35
    beside = COLUMNS[:2] if narrow else COLUMNS  # points right of the bars
    with chart(0.6 + legend + ROW * len(groups), "Method and bits per operation type", narrow=narrow) as canvas:
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
            texts = (f"{group.avg_bits:.2f}", percent(group.weight_share), percent(group.bit_share or 0))
            for (x, _), text in zip(beside, texts, strict=False):
                axes.annotate(text, (1, row), (x + 34, 0), xycoords=("axes fraction", "data"), va="center", ha="right",
                              textcoords="offset points", fontsize=8)  # fmt: skip
        for x, text in beside:
            axes.annotate(text, (1, -1), (x + 34, 0), xycoords=("axes fraction", "data"), va="center", ha="right",
                          textcoords="offset points", fontsize=7.5, color=MUTED)  # fmt: skip
        for option in used:
            scheme = space.options[option]
            axes.plot([], [], "s", ms=6, color=color(scheme), label=describe(scheme.label))
        legend_above(canvas, axes)
        axes.set_xlim(0, 1)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        rows_of(axes, [short_name(group.name, SHORT if narrow else LONG) for group in groups])
    return canvas.svg
