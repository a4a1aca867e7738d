"""What tuning brought: the held-out error on the way, and the distances before and after."""

from collections.abc import Mapping, Sequence

from quantdm.report.figures import FAINT, HUES, MUTED, RECIPE, chart, legend_above
from quantdm.report.markup import esc, figure, missing, paragraph, table
from quantdm.report.records import Records
from quantdm.report.sections import spread_cell

NAMES = {"untuned": "Recipe before tuning", "tuned": "Recipe, tuned"}


def tuning(records: Records) -> str:
    """Return the held-out curve, the table of both, and whether the tuning is used."""
    record = records.tuning
    if record is None:
        return missing("tuning.json", "The recipe was not tuned")
    settings = record["settings"]
    caption = (
        "Squared error of the denoiser's output over its square, on full-precision trajectories that were not trained "
        f"on. {settings['steps']} steps of {settings['rows']} samples from {settings['images']} trajectories; the best "
        "moment is kept (dot), rounded to what is stored."
    )
    html = figure(held_out(record["curve"]), "Held-out error while tuning.", caption)
    rows = []
    for name, figures in record["figures"].items():
        row = {"fid_fp": figures["mean"]["fid_fp"], "fid_fp_sd": figures["sd"]["fid_fp"]}
        psnr = figures["mean"].get("psnr_fp")
        chosen = (name == "tuned") == record["used"]
        cells = [esc(NAMES[name]), spread_cell(row, "fid_fp", 4), "–" if psnr is None else f"{psnr:.1f}"]
        rows.append(("chosen" if chosen else "", cells))
    html += table(
        [("", "the marked one is in use"), ("FID to full precision", "verification draws"), ("PSNR", "dB")], rows
    )
    if not record["used"]:
        html += paragraph("Tuning did not lower the distance on every draw, so it is left out.")
    return html


def held_out(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Draw the held-out error of every denoiser against the steps."""
    with chart(2.3, "Held-out error while tuning") as canvas:
        axes = canvas.axes(1, 1, squeeze=False)[0, 0]
        hues = [RECIPE, MUTED, *HUES.values()]
        for hue, (part, curve) in zip(hues, curves.items(), strict=False):
            steps, losses = [step for step, _ in curve], [loss for _, loss in curve]
            axes.plot(steps, losses, color=hue, label=part)
            best = min(range(len(losses)), key=losses.__getitem__)
            mark = axes.plot(steps[best], losses[best], "o", ms=5, color=hue, mec="white", mew=0.6)[0]
            canvas.hover(mark, f"{part}: {losses[best]:.3g} after {steps[best]} steps, {losses[0]:.3g} before")
        axes.set(xlabel="steps", ylabel="relative error")
        axes.set_yscale("log")
        axes.grid(axis="y", color=FAINT)
        if len(curves) > 1:
            legend_above(canvas, axes)
    return canvas.svg
