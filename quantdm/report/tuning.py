"""What tuning brought: the held-out error on the way, and the distances before and after."""

from collections.abc import Mapping, Sequence

from quantdm.report.markup import esc, figure, missing, paragraph, spread_cell, table
from quantdm.report.plot import Plot, around
from quantdm.report.records import Records

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
    html = figure(held_out(record["curve"]), "Held-out error while tuning.", caption, kind="one")
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
    losses = [loss for curve in curves.values() for _, loss in curve if loss > 0]
    last = max(step for curve in curves.values() for step, _ in curve)
    plot = Plot("Held-out error while tuning", (0, max(last, 1)), around(losses, log=True), log_y=True, size=(420, 200))
    plot.axes("steps")
    names = []
    for part, curve in curves.items():
        step, loss = min(curve, key=lambda point: point[1])
        plot.line(curve, "curve")
        plot.dot(step, loss, "chosen", f"{part}: {loss:.3g} after {step} steps, {curve[0][1]:.3g} before", radius=4)
        names.append((step, loss, f"{part}: {loss:.3g}", "name"))
    plot.labels(names)
    return plot.svg
