"""Publish finished allocation studies: the README's tables, and pictures of the same noises in docs/.

PYTHONPATH=. python eval/publish_results.py digits-dit digits-sd        # after eval/allocation_study.py of both
PYTHONPATH=. python eval/publish_results.py digits-dit digits-sd --tables-only      # the pictures stay
"""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from eval.allocation_study import size_name
from quantdm import CalibrationSpec, Recipe, apply_recipe, generate, load_pipeline, load_protocol, load_recipe
from quantdm.cli.images import image_grid
from quantdm.files import atomic_path, read_json
from quantdm.metrics.samples import real_floor
from quantdm.metrics.statistics import spread
from quantdm.pipelines.generate import as_bytes
from quantdm.pipelines.known import known_pipelines

ROOT = Path(__file__).resolve().parents[1]
COLUMNS, SEED = 20, 101 * 10**6
ROWS = {
    "recipe": "**recipe**",
    "recipe untuned": "before tuning",
    "recipe A6": "recipe, 6-bit activations",
    "uniform": "uniform, next width",
    "one-layer sensitivity": "one-layer sensitivities (knapsack)",
    "least weight error": "least weight error (knapsack)",
}
SECOND = {"recipe": "recipe", "recipe untuned": "before tuning", "uniform": "uniform, next width"}
IMAGENET = "fd:efficientnet-lite0"


def draw_samples(model: str, size: str, rows: dict[str, Any], out: Path) -> None:
    """Draw the same noises in full precision, with the best uniform scheme and with the (untuned) recipe of a size."""
    uniform = rows["uniform"]
    recipes = {
        "full precision\n16 bits": None,
        f"{uniform['note']}\n{uniform['avg_bits']:.2f} bits": Recipe(model=model, default=uniform["note"]),
        f"recipe\n{rows['recipe']['avg_bits']:.2f} bits": load_recipe(
            ROOT / "recipes" / f"{model}-{size_name(float(size))}bit-a16.yaml"
        ),
    }
    fig, axes = plt.subplots(len(recipes), 1, figsize=(10, 0.62 * len(recipes)), layout="constrained")
    for axis, (label, recipe) in zip(axes, recipes.items(), strict=True):
        pipe = load_pipeline(model)
        if recipe is not None:
            apply_recipe(pipe, recipe, calibration=recipe.calibration or CalibrationSpec(protocol=model), insist=True)
        images = generate(pipe, load_protocol(model), range(SEED, SEED + COLUMNS))
        axis.imshow(image_grid(as_bytes(images), COLUMNS))
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[])
    with atomic_path(out) as temporary:
        fig.savefig(temporary, format="png", dpi=130)
    plt.close(fig)


def second_rows(second: dict[str, Any], sizes: Iterable[str]) -> list[str]:
    """Return the rows by ImageNet features; "-" where one was not measured, and none that was measured nowhere."""
    found = []
    for name, label in SECOND.items():
        cells = [second["sizes"].get(size, {}).get("rows", {}).get(name) for size in sizes]
        if not any(cells):
            continue
        told = ["-" if cell is None else f"{cell[IMAGENET]:.3f}" for cell in cells]
        found.append(f"| {label}: FD with ImageNet features | {' | '.join(told)} |")
    return found


def table(result: dict[str, Any], before: dict[str, Any], second: dict[str, Any] | None) -> str:
    """Return a study as a Markdown table: one column per size.

    `before` is the study of nine options without calibration, at some of the sizes; `second` what another ruler says.
    """
    sizes = {size: {row["name"]: row for row in rows} for size, rows in result["sizes"].items()}
    floor = real_floor(load_protocol(result["model"]))
    fp = next(iter(sizes.values()))["fp"]
    lines = [
        f"`{result['model']}`: `fid_fp`, mean ± standard deviation over three draws of 1,000 images, 20 steps. Two "
        f"full-precision draws of different noises are {result['sampling_noise']['mean']:.3f} apart.",
        "",
        f"| average bits | {' | '.join(sizes)} |",
        "|---|" + "---|" * len(sizes),
    ]
    known = next(iter(sizes.values()))
    for name, label in ((name, label) for name, label in ROWS.items() if name in known):
        cells = []
        for rows in sizes.values():
            note = f" ({rows[name]['note']}, {rows[name]['avg_bits']:.2f} b)" if name == "uniform" else ""
            cells.append(f"{spread(rows[name]['fid_fp'], rows[name]['fid_fp_sd'], 4)}{note}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    data_free = {size: {row["name"]: row for row in rows} for size, rows in before["sizes"].items()}
    cells = [data_free[size]["recipe"] if size in data_free else None for size in sizes]
    told = ["-" if row is None else spread(row["fid_fp"], row["fid_fp_sd"], 4) for row in cells]
    lines.append(f"| recipe of data-free options | {' | '.join(told)} |")
    lines += [] if second is None else second_rows(second, sizes)
    told_of_recipe = {
        "PSNR to full precision": lambda row: f"{row['psnr_fp']:.1f} dB",
        f"FID to real digits (full precision {fp['fid_real']:.3f}, real against real {floor:.3f})": lambda row: (
            f"{row['fid_real']:.3f}"
        ),
        f"images that a classifier takes for what was asked for (full precision {fp['agreement']:.1%})": lambda row: (
            f"{row['agreement']:.1%}"
        ),
        f"denoiser on disk (16 bits: {fp['denoiser_bytes'] / 1e6:.1f} MB)": lambda row: (
            f"{row['denoiser_bytes'] / 1e6:.2f} MB"
        ),
    }
    for label, tell in told_of_recipe.items():
        lines.append(f"| recipe: {label} | {' | '.join(tell(rows['recipe']) for rows in sizes.values())} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=known_pipelines())
    parser.add_argument("--tables-only", action="store_true", help="draw no pictures")
    arguments, tables = parser.parse_args(), []
    for model in arguments.models:
        results = ROOT / "eval" / "results"
        result, before = (
            read_json(results / f"{kind}_{model}.json", version=1) for kind in ("calibrated", "allocation")
        )
        size, found = next(iter(result["sizes"].items()))  # the smallest: there differences are seen
        if not arguments.tables_only:
            draw_samples(model, size, {row["name"]: row for row in found}, ROOT / "docs" / f"{model}.png")
        other = results / f"second_ruler_{model}.json"
        tables.append(table(result, before, read_json(other, version=1) if other.is_file() else None))
    readme = (ROOT / "README.md").read_text()
    block = "<!-- results:begin -->\n" + "\n\n".join(tables) + "\n<!-- results:end -->"
    with atomic_path(ROOT / "README.md") as temporary:
        temporary.write_text(
            re.sub(r"<!-- results:begin -->.*<!-- results:end -->", block, readme, flags=re.DOTALL), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
