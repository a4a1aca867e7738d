"""What each further step does to the recipe: tuning, 6-bit activations, the correction of the sampler."""

from typing import Any

from quantdm.report.insights import verdict
from quantdm.report.markup import esc, figure, missing
from quantdm.report.meters import Meter, dots
from quantdm.report.records import Records
from quantdm.report.wording import plus_minus

STEPS = {
    "recipe-untuned": "recipe, untuned",
    "recipe": "recipe",
    "recipe+a6": "with 6-bit activations",
    "recipe+a6+correction": "and the sampler corrected",
}
PAIRS = (
    ("recipe-untuned", "recipe", "Tuning"),
    ("recipe", "recipe+a6", "6-bit activations"),
    ("recipe+a6", "recipe+a6+correction", "The correction of the sampler"),
)
WORDS = {"better": "lowers", "worse": "raises", "tie": "does not measurably change"}
MANY = {"better": "lower", "worse": "raise", "tie": "do not measurably change"}


def ablation(records: Records) -> str:
    """Return one row per step with its spread, and one sentence per step."""
    rows = {name: records.rows[name] for name in STEPS if name in records.rows}
    if len(rows) < 2:
        return missing("summary.json", "No activations or correction measured")
    meters = [
        Meter(STEPS[n], r["fid_fp"], plus_minus(r), "recipe" if n == "recipe" else "", r.get("fid_fp_sd") or 0.0)
        for n, r in rows.items()
    ]
    said = "".join(
        f"<li>{esc(_says(name, rows[one], rows[two]))}</li>" for one, two, name in PAIRS if {one, two} <= set(rows)
    )
    picture = dots(meters, "Distance to full precision step by step (fid_fp, less is better)")
    caption = (
        "Distance of the images to full precision (fid_fp), the same noises in every row; lines are one standard "
        "deviation over draws. A difference counts beyond two of both, combined."
    )
    return f'<ul class="said">{said}</ul>' + figure(picture, "Step by step.", caption, kind="wide")


def _says(name: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    """Say what a step does: its verdict with both figures."""
    if before["fid_fp"] == after["fid_fp"]:
        return f"{name}: the same images, nothing is in use."
    found = verdict(after, before)
    figures = f"from {plus_minus(before)} to {plus_minus(after)}"
    if found == "unknown":
        return f"{name}: {figures}; one draw does not say whether that counts."
    words = MANY if name.startswith("6") else WORDS
    return f"{name} {words[found]} the distance, {figures}."
