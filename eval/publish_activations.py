"""Publish what activations of few bits cost: the tables of docs/activations.md, from eval/results/activations_*.json.

PYTHONPATH=. python eval/publish_activations.py        # after eval/bench_activations.py
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantdm.files import atomic_path, read_json
from quantdm.metrics.statistics import spread
from quantdm.pipelines.known import known_pipelines

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "activations.md"
BEGIN, END = "<!-- activations:begin -->", "<!-- activations:end -->"
BITS = (8, 6, 5, 4)
NAIVE, CHOSEN = "per tensor", "chosen per layer"
REMEDIES = ("+ split", "+ outlier channels", "+ rotation", "+ equalisation", "+ sensitive at 8")
VARIANTS = (NAIVE, "per token", *REMEDIES, CHOSEN)
WEIGHTS = {"W16": "full precision", "W4": "k-means, 4 bits, calibrated", "3.0 bits": "the published recipe of 3.0 bits"}
GOALS = (("planted", 6, 0.9), ("plain", 4, 0.8))  # bed, bits, how much of the gap is to be closed


def tables(record: Mapping[str, Any]) -> str:
    """Return the tables of one pipeline as Markdown: one for every kind of weights that was measured."""
    parts = []
    for weights in dict.fromkeys(row["weights"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["weights"] == weights]
        parts.append(f"**`{record['model']}`, weights: {WEIGHTS[weights]}.** {' '.join(told(rows))}")
        parts.append("\n".join(_table(rows)))
    draws = sorted({row["draws"] for row in record["rows"]})
    many = f"{draws[0]}" if len(draws) == 1 else f"{draws[0]} to {draws[-1]} (marked)"
    parts.append(
        f"Draws of {record['images']} images, {record['steps']} steps: {many}; mean ± sd. {record['date']}, "
        f"torch {record['versions']['torch']}."
    )
    return "\n\n".join(parts)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"| inputs | {' | '.join(f'A{bits}' for bits in BITS)} |", "|---|" + "---|" * len(BITS)]
    most = max(row["draws"] for row in rows)
    for bed in dict.fromkeys(row["bed"] for row in rows):
        own = {(row["variant"], row["bits"]): row for row in rows if row["bed"] == bed}
        if ("A16", 16) in own:
            lines.append(f"| **{bed}**, A16 | {cell(own['A16', 16], most)} | | | |")
        for variant in (name for name in VARIANTS if any(variant == name for variant, _ in own)):
            cells = [cell(own.get((variant, bits)), most) for bits in BITS]
            lines.append(f"| {bed}, {variant} | {' | '.join(cells)} |")
    return lines


def cell(row: Mapping[str, Any] | None, most: int) -> str:
    """Return distance and PSNR of a row, and its draws where they are fewer than the others have."""
    if row is None:
        return "-"
    digits = 4 if row["fid_fp"] < 1 else 2
    few = "" if row["draws"] == most else f", {row['draws']} draw{'s' if row['draws'] > 1 else ''}"
    return f"{spread(row['fid_fp'], row['fid_fp_sd'], digits)} ({row['psnr_fp']:.1f} dB{few})"


def told(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return in sentences how much of the gaps is closed, and how far A8 is from A16."""
    found = {(row["bed"], row["variant"], row["bits"]): row for row in rows}
    said = []
    for bed, bits, goal in GOALS:
        naive, chosen, alone = (found.get((bed, *key)) for key in ((NAIVE, bits), (CHOSEN, bits), ("A16", 16)))
        if naive and chosen and alone:
            closed = 1 - (chosen["fid_fp"] - alone["fid_fp"]) / (naive["fid_fp"] - alone["fid_fp"])
            said.append(f"Chosen per layer closes {closed:.1%} of the gap at A{bits}, {bed} (goal {goal:.0%}).")
    for bed in ("plain", "planted"):
        eight, alone = found.get((bed, CHOSEN, 8)), found.get((bed, "A16", 16))
        if eight and alone:
            said.append(f"A8 {bed}: {eight['fid_fp'] - alone['fid_fp']:+.5f} against A16{_noise(eight, alone)}.")
    return said


def _noise(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    if one["fid_fp_sd"] is None or other["fid_fp_sd"] is None:
        return ""
    return f" (sd of the two over draws {one['fid_fp_sd']:.5f} and {other['fid_fp_sd']:.5f})"


def page(text: str) -> str:
    """Return the page with the tables of what is recorded now."""
    paths = [ROOT / "eval" / "results" / f"activations_{model}.json" for model in known_pipelines()]
    found = "\n\n".join(tables(read_json(path)) for path in paths if path.is_file())
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{found}\n{END}", text, flags=re.S)


def main() -> None:
    with atomic_path(PAGE) as temporary:
        temporary.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
