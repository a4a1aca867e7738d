"""The charts of a report: records in, one SVG out. Every chart is drawn from numbers that the run measured."""

import numpy as np
from numpy.typing import NDArray

from quantdm.report.figures import as_percent, chart, color, describe, family
from quantdm.schemes import MAX_BITS, ORIGINAL
from quantdm.surrogates import SearchSpace

# Result row -> name beside the point.
MARKS = {
    "uniform-w4": "uniform, 4 bits",
    "kmeans-w4": "k-means, 4 bits",
    "uniform-next-width": "best uniform",
    "least-weight-error": "least weight error",
    "sensitivity-same-size": "sensitivities alone",
    "recipe": "recipe",
}


def methods(space: SearchSpace, values: NDArray[np.float64] | None, *, narrow: bool = False) -> str:
    """Draw per method the median one-layer error, and the mean learned value, against the bits that it costs."""
    families = list(dict.fromkeys(family(option) for option in space.options if option != ORIGINAL))
    cost = space.bits.sum(axis=0) / space.num_weights.sum()
    tables = [("Measured: median one-layer error (log scale)", np.median(space.noise_error, axis=0))]
    tables += [] if values is None else [("Learned: mean value in −log FID per layer", values.mean(axis=0))]
    panels = len(tables) if narrow else 2
    with chart(2.9 * panels if narrow else 2.7, "Methods against the bits they cost", narrow=narrow) as canvas:
        found = canvas.panels(panels)
        for axes, (title, heights) in zip(found, tables, strict=False):
            for name in families:
                members = [i for i, option in enumerate(space.options) if family(option) == name]
                hue = color(space.options[members[0]].model_copy(update={"bits": MAX_BITS}))
                axes.plot(cost[members], heights[members], "-", color=hue, label=name)
                for i in members:
                    mark = axes.plot(cost[i], heights[i], "o", ms=5, color=hue, mec="white", mew=0.6)[0]
                    canvas.hover(mark, f"{describe(space.labels[i])}: {cost[i]:.3f} bits, {heights[i]:.3g}")
            axes.set(title=canvas.fold(title), xlabel="average bits per weight, overhead included")
            axes.grid(axis="y")
        found[0].set_yscale("log")
        as_percent(found[0].yaxis, log=True)
        found[0].legend(loc="upper right")
        for axes in found[len(tables) :]:
            axes.set_visible(False)
    return canvas.svg
