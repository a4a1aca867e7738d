"""The result rows on a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table


def show_table(summary: dict[str, Any], console: Console | None = None) -> None:
    """Print the result rows, at most 79 columns wide."""
    table = Table(
        title=f"{summary['model']}: mean ± sd over {len(summary['protocol']['draws'])} draws", title_style="bold"
    )
    for name in ("", "bits", "MB", "fid_fp", "psnr", "fid_real"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for row in summary["rows"]:
        table.add_row(
            row["name"],
            f"{row['avg_bits']:.2f}",
            f"{row['denoiser_bytes'] / 1e6:.2f}",
            f"{row['fid_fp']:.4f} ± {row['fid_fp_sd']:.4f}",
            "-" if row["psnr_fp"] is None else f"{row['psnr_fp']:.1f}",
            f"{row['fid_real']:.3f}" if "fid_real" in row else "-",
        )
    console = console or Console(width=79)
    console.print(table)
    protocol, noise = summary["protocol"], summary["fp_noise"]
    console.print(
        f"{protocol['images']} images per draw, {protocol['steps']} steps. "
        f"Two full-precision draws of different noises are {noise['mean']:.4f} apart."
    )
