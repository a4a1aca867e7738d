"""The noise per sampling step, the measured variants of the correction, and whether it is worth it here."""

import math
from collections.abc import Sequence

import numpy as np

from quantdm.correction import Correction
from quantdm.errors import counted
from quantdm.report.markup import esc, figure, missing, paragraph, spread_cell, table
from quantdm.report.plot import Plot, around
from quantdm.report.records import Records
from quantdm.report.wording import percent

VARIANTS = {
    "none": "no correction",
    "bias": "mean error removed",
    "k": "slope removed",
    "both": "slope and mean error removed",
    "variance": "the sampler's variance lowered",
    "both+variance": "slope and mean error removed, the sampler's variance lowered",
    "ptqd": "PTQD",
    "mmse": "posterior mean (D2-DPM)",
    "stepbaq": "StepbaQ",
    "qdrift": "Q-Drift",
    "tac": "TAC",
    "tcec": "gain per channel (TCEC)",
}

PANELS = (
    ("k", "k", "slope of the error on the output (0: not significant)"),
    ("R²", "r2", "share of the error that the slope explains"),
    ("bias", "bias", "largest mean error of a channel"),
    ("q", "q", "residual: standard deviation of the rest"),
    ("occupancy", "occupancy", "variance added over the variance of the step"),
    ("lag-1", "lag1", "correlation of the rest with the next step's"),
)


def variant_name(choice: str) -> str:
    """Say what a variant is, and on which half of the noise levels alone."""
    name, _, half = choice.partition(", ")
    return VARIANTS[name] + (f", {half} of the levels" if half else "")


def noise(records: Records) -> str:
    """Return the noise statistics per step and the measured variants of the correction."""
    c = records.correction
    if c is None:
        return missing("correction.safetensors", "No noise statistics")
    if records.steps:  # at the steps that the sampler really takes
        timesteps: Sequence[float] = [step["timestep"] for step in records.steps]
        found = {key: [step[key] for step in records.steps] for key in records.steps[0]}
    else:
        timesteps = c.log_snr.tolist()
        found = {"k": c.k.tolist(), "bias": np.abs(c.bias).max(axis=1).tolist(), "q": c.q.tolist()}
        found |= {name: np.asarray(values).tolist() for name, values in c.diagnostics.items()}
    panels = [panel for panel in PANELS if panel[1] in found]
    plots = "".join(_step_plot(timesteps, found[key], title, text) for title, key, text in panels)
    caption = (
        "From noise (left) to image (right): error of the quantized network's output on the same inputs, after "
        "guidance, fitted per noise level as k · output + bias + rest. Lag-1 says how far the rest resembles that of "
        "the next step: errors that resemble each other add up, and the variance correction makes room for that."
    )
    html = figure(plots, "Quantization noise per sampling step.", caption, kind="small")
    listing = table(
        [("Timestep" if records.steps else "log SNR", ""), *((title, "") for title, _, _ in panels)],
        [("", [f"{t:.4g}", *(f"{found[key][i]:.4g}" for _, key, _ in panels)]) for i, t in enumerate(timesteps)],
    )
    html += f"<details><summary>All {counted(len(timesteps), 'step')} as numbers</summary>{listing}</details>"
    if not c.measured:
        return html + paragraph(f"In use: {variant_name(c.choice)}.")
    rows = []
    for variant, distances in c.measured.items():
        row = {"d": float(np.mean(distances)), "d_sd": float(np.std(distances, ddof=1)) if len(distances) > 1 else None}
        rows.append(("chosen" if variant == c.choice else "", [esc(variant_name(variant)), spread_cell(row, "d", 4)]))
    head = [("Variant", "the marked one is in use"), ("Distance to full precision", "held-out runs")]
    note = (
        "The variant is chosen by its measured outcome: more correction is taken only where it lowers the distance on "
        "held-out runs beyond noise (paired, 95\u00a0%)."
    )
    variants = f"<h3>Which correction helps</h3>{table(head, rows)}{paragraph(note, 'caption')}"
    return f'<p class="lead">{esc(worth(c, records.steps))}</p>{html}{variants}'


def _step_plot(timesteps: Sequence[float], values: Sequence[float], title: str, meaning: str) -> str:
    """Draw one statistic over the steps."""
    limits = around(values, zero=True) if any(values) else (-1.0, 1.0)
    plot = Plot(f"{title} per step: {meaning}", (0, max(len(values) - 1, 1)), limits, size=(300, 130))
    every = max(1, len(timesteps) // 4)
    ticks = [(float(i), f"{timesteps[i]:.3g}") for i in range(0, len(timesteps), every)]
    plot.axes("", x_ticks=ticks, count=3)
    plot.line(list(enumerate(values)), "curve")
    for index, value in enumerate(values):
        plot.dot(index, value, "step", f"{title} at {timesteps[index]:.4g}: {value:.4g}", radius=2.4)
    return f'<div><h3>{esc(title)}</h3><p class="under">{esc(meaning)}</p>{plot.svg}</div>'


def worth(correction: Correction, steps: Sequence[dict[str, float]]) -> str:
    """Say in one sentence with figures whether the correction is worth it here, and why."""
    none = np.array(correction.measured["none"])
    others = {name: np.array(found) for name, found in correction.measured.items() if name != "none"}
    kept = correction.choice
    name = kept if kept in others else min(others, key=lambda other: others[other].mean(), default=None)
    if name is None:
        return "No correction was tried."
    none = none[: len(others[name])]  # a variant that is given up is not measured on all runs
    gain = none - others[name]
    error = gain.std(ddof=1) / math.sqrt(len(gain)) if len(gain) > 1 else math.nan
    figures = (
        f"{others[name].mean():.4f} against {none.mean():.4f} without, a paired gain of {gain.mean():.4f} ± "
        f"{error:.4f} over {len(gain)} held-out runs"
    )
    if kept != "none":
        return f"The correction is worth it here: {variant_name(name)} has {figures}."
    text = f"No correction is in use: the best of {len(others)}, {variant_name(name)}, has {figures}"
    verdict = "which is within noise" if gain.mean() > 0 else "so none helps"
    share = max(correction.diagnostics.get("r2", np.zeros(1)))
    acting = [step["occupancy"] for step in steps if step["feasible"]]
    room = f"the noise takes at most {percent(max(acting))} of the room in a step" if acting else "no step has room"
    return f"{text}, {verdict}: {room}, a slope explains at most {percent(share)} of it."
