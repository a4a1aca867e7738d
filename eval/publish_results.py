"""Publish finished demo runs: recipes/, eval/results/, the README's table and pictures.

python eval/publish_results.py runs/digits-dit-3bit runs/digits-sd-3bit
"""

import argparse
import datetime
import platform
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from quantdm import load_recipe
from quantdm.files import atomic_path, load_tensors, read_json, write_json, write_text
from quantdm.inspection import image_grid
from quantdm.search.run import Run, cores

ROOT = Path(__file__).resolve().parents[1]
ROWS = {
    "fp": "full precision",
    "uniform-w4": "uniform, 4 bits",
    "kmeans-w4": "k-means per channel, 4 bits",
    "uniform-same-size": "uniform, same size",
    "sensitivity-same-size": "one-layer sensitivities, same size",
    "recipe": "**recipe**",
    "recipe+a6": "recipe, 6-bit activations",
    "recipe+a6+correction": "recipe, 6-bit activations, corrected",
}


def draw_samples(run: Run, out: Path, *, columns: int = 20) -> None:
    """Draw the same noises under full precision, uniform bits and the recipe, one strip each."""
    samples, _ = load_tensors(run.path("samples.safetensors"))
    names = [name for name in ("fp", "uniform-same-size", "recipe") if name in samples]
    fig, axes = plt.subplots(len(names), 1, figsize=(10, 0.62 * len(names)), layout="constrained")
    rows = {row["name"]: row for row in read_json(run.path("summary.json"))["rows"]}
    for axis, name in zip(axes, names, strict=True):
        axis.imshow(image_grid(samples[name][:columns], columns))
        label = rows[name]["note"] if name == "uniform-same-size" else ROWS[name].strip("*")
        axis.set_ylabel(f"{label}\n{rows[name]['avg_bits']:.1f} bits", rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[])
    with atomic_path(out) as temporary:
        fig.savefig(temporary, format="png", dpi=130)
    plt.close(fig)


def table(summary: dict) -> str:
    """Return a summary as a Markdown table."""
    protocol, noise = summary["protocol"], summary["fp_noise"]["mean"]
    lines = [
        f"`{summary['model']}`, {len(protocol['draws'])} draws of {protocol['images']} images, "
        f"{protocol['steps']} steps. Two full-precision draws of different noises are {noise:.3f} apart; "
        f"the real training digits are {summary['fid_floor']:.3f} from the real test digits.",
        "",
        "| weights | bits | denoiser | fid_fp | PSNR | FID to real digits |",
        "|---|---|---|---|---|---|",
    ]
    for row in summary["rows"]:
        note = f" ({row['note']})" if row["name"] == "uniform-same-size" else ""
        psnr = "" if row["psnr_fp"] is None else f"{row['psnr_fp']:.1f} dB"
        lines.append(
            f"| {ROWS[row['name']]}{note} | {row['avg_bits']:.2f} | {row['denoiser_bytes'] / 1e6:.2f} MB | "
            f"{row['fid_fp']:.3f} ± {row['fid_fp_sd']:.3f} | {psnr} | {row['fid_real']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    tables = []
    for folder in parser.parse_args().runs:
        run = Run.open(folder)
        model, target = run.settings.model, run.settings.target_bits
        summary = read_json(run.path("summary.json"))
        load_recipe(run.path("recipe.yaml")).save(ROOT / "recipes" / f"{model}-{target:.1f}bit.yaml")
        machine = f"{platform.machine()}, {cores()} cores, {run.settings.dtype}"
        record = summary | {"machine": machine, "date": datetime.date.today().isoformat()}
        record |= {"candidates": read_json(run.path("selection.json"))["candidates"]}
        write_json(ROOT / "eval" / "results" / f"demo_{model}_{target:.1f}bit.json", record)
        draw_samples(run, ROOT / "docs" / f"{model}.png")
        tables.append(table(summary))
    readme = (ROOT / "README.md").read_text()
    block = "<!-- results:begin -->\n" + "\n\n".join(tables) + "\n<!-- results:end -->"
    write_text(
        ROOT / "README.md", re.sub(r"<!-- results:begin -->.*<!-- results:end -->", block, readme, flags=re.DOTALL)
    )


if __name__ == "__main__":
    main()
