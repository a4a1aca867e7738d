"""The result rows on a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from quantdm.errors import counted
from quantdm.metrics.statistics import spread


def show_table(summary: dict[str, Any], console: Console | None = None) -> None:
    """Print the result rows, at most 79 columns wide."""
    table = Table(
        title=f"{summary['model']}: mean ± sd over {counted(len(summary['protocol']['draws']), 'draw')}",
        title_style="bold",
    )
    for name in ("", "bits", "MB", "fid_fp", "psnr", "fid_real"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for row in summary["rows"]:
        table.add_row(
            row["name"],
            f"{row['avg_bits']:.2f}",
            f"{row['denoiser_bytes'] / 1e6:.2f}",
            spread(row["fid_fp"], row["fid_fp_sd"]),
            "-" if row["psnr_fp"] is None else f"{row['psnr_fp']:.1f}",
            f"{row['fid_real']:.3f}" if "fid_real" in row else "-",
        )
    console = console or Console(width=79)
    console.print(table)
    for key, better in summary.get("metrics", {}).items():
        shown = [f"{r['name']} {spread(r[key], r[f'{key}_sd'])}" for r in summary["rows"] if r.get(key) is not None]
        if shown:
            console.print(f"{key} ({better} is better): {'; '.join(shown)}.")
    protocol, noise = summary["protocol"], summary["fp_noise"]["mean"]
    lines = [f"{row['name']}: {row['note']}." for row in summary["rows"] if row["name"] == "uniform-next-width"]
    lines.append(f"{counted(protocol['images'], 'image')} per draw, {counted(protocol['steps'], 'step')}.")
    few = min(row.get("draws", len(protocol["draws"])) for row in summary["rows"])
    if few < len(protocol["draws"]):
        lines.append(f"Rows that are clearly apart from the recipe stop after {counted(few, 'draw')}.")
    if noise is not None:
        lines.append(f"Two full-precision draws of different noises are {noise:.4f} apart.")
    for row in summary["rows"]:
        if row["flagged"] or row["constant"]:
            lines.append(
                f"{row['name']}: the safety checker flagged {row['flagged']} images of all draws, {row['constant']} "
                "others have one colour only."
            )
    console.print(" ".join(lines))
