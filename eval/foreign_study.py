"""The corridor on the network that nobody here trained: a recipe of 3 bits against single schemes of no fewer bytes.

    python eval/foreign_study.py foreign -o runs/foreign      # after eval/foreign.py; run it again to go on

A small search (labels by pyramid features: they need no weights and no second network), then the rows on equal seeds by
FD-EfficientNet-Lite0 (the extra `features`), pyramid features, PSNR and SSIM. Says whether the recipe beats the best
single scheme at no fewer bits by both rulers. Writes eval/results/foreign_study.json.
"""

import argparse
import datetime
import platform
from pathlib import Path
from typing import Any

from quantdm import Scheme, list_layers, load_pipeline, load_protocol, load_recipe, search
from quantdm.cli.rows import Asked, make_table
from quantdm.files import read_json, write_json
from quantdm.hub.quantize import stored_bits
from quantdm.runs.settings import Effort

HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "foreign_study.json"
BITS, TRIALS = 3.0, 30
LABELS = [*(f"kmeans-channel-{b}" for b in (2, 3, 4, 6)), *(f"uniform-channel-{b}" for b in (3, 4))]
EFFORT = Effort(label_images=10, label_steps=1, verify_images=12, noise_images=2)
RIVALS = ("kmeans-channel-3", "uniform-channel-3", "kmeans-channel-4", "uniform-channel-4")
IMAGES, DRAWS = 40, (901, 902, 903)
RULERS = {"fd:efficientnet-lite0": "lower", "fd:pyramid": "lower", "psnr": "higher"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--features", default="efficientnet-lite0,pyramid")
    arguments = parser.parse_args()
    protocol = HERE / "foreign.yaml"
    options = [Scheme.parse(label) for label in LABELS]
    search(
        arguments.pipeline, target_bits=BITS, trials=TRIALS, run_dir=arguments.out / "search", options=options,
        protocol=load_protocol(protocol), effort=EFFORT, workers=1,
    )  # fmt: skip
    recipe = arguments.out / "search" / "recipe.yaml"
    asked = Asked(
        str(arguments.pipeline), (f"recipe={recipe}", *RIVALS), arguments.out / "table", IMAGES, DRAWS, None,
        str(protocol), arguments.features, None, "recipe", None, False, 10,
    )  # fmt: skip
    print(make_table(asked))
    table = read_json(arguments.out / "table" / "table.json", version=1)
    record = {
        "version": 1,
        "protocol": table["protocol"],
        "notes": table["notes"],
        "search": {"bits": BITS, "trials": TRIALS, "options": LABELS, "label_images": EFFORT.label_images},
        "bits": bits_of(arguments.pipeline, recipe),
        "rows": {row["row"]: {"mean": row["mean"], "sd": row["sd"]} for row in table["rows"]},
        "differences": table["differences"],
        "manifest": table["manifest"]["sha256"],
        "versions": table["manifest"]["versions"],
        "machine": platform.machine(),
        "date": datetime.date.today().isoformat(),
    }
    record["beats_best_3_bit_scheme_of_no_fewer_bits"] = verdict(record)
    write_json(OUT, record)
    print(record["bits"], record["beats_best_3_bit_scheme_of_no_fewer_bits"])


def bits_of(pipeline: Path, recipe: Path) -> dict[str, float]:
    """Return bits per quantizable weight of every row, tables and scales included."""
    layers = list_layers(load_pipeline(pipeline).unet)
    weights = sum(layer.num_weights for layer in layers)
    chosen = load_recipe(recipe).config
    rows: dict[str, Any] = {"recipe": {layer.name: chosen[layer.name] for layer in layers}}
    rows |= {label: dict.fromkeys([layer.name for layer in layers], Scheme.parse(label)) for label in RIVALS}
    return {
        label: sum(stored_bits(layer, row[layer.name]) for layer in layers) / weights for label, row in rows.items()
    }


def verdict(record: dict[str, Any]) -> dict[str, bool]:
    """Return, per ruler, whether the recipe beats the best 3-bit scheme that has no fewer bits."""
    rows, bits = record["rows"], record["bits"]
    rivals = [label for label in RIVALS if label.endswith("-3") and bits[label] >= bits["recipe"]]
    found = {}
    for ruler, better in RULERS.items():
        if ruler not in rows["recipe"]["mean"]:
            continue
        values = [rows[label]["mean"][ruler] for label in rivals]
        mine = rows["recipe"]["mean"][ruler]
        found[ruler] = mine < min(values) if better == "lower" else mine > max(values)
    return found


if __name__ == "__main__":
    main()
