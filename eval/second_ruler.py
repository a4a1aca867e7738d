"""A second ruler: do ImageNet features order the rows of the embedded pipelines as digit features do?

    python eval/second_ruler.py digits-dit -o runs/ruler      # needs the extra `features`; run it again to go on
    python eval/second_ruler.py digits-sd -o runs/ruler

Rows: shipped recipes and single schemes. Figures to full precision by digit features and by EfficientNet-Lite0, paired
error, and two that need no reference: whether the digit classifier sees what was asked for, and the Inception Score by
it. Writes eval/results/second_ruler_PIPELINE.json: the table and the rank agreement of every pair of rulers, over all
rows, and over those that are better than RUINED by digit features.
"""

import argparse
import datetime
import platform
from pathlib import Path
from typing import Any

from quantdm.cli.rows import Asked, make_table
from quantdm.files import read_json, write_json
from quantdm.machine import cores
from quantdm.metrics.agreement import rank_agreement

ROOT = Path(__file__).resolve().parents[1]
IMAGES, STEPS, DRAWS = 250, 10, (801, 802, 803)
SCHEMES = tuple(f"{method}-channel-{bits}" for method in ("uniform", "kmeans") for bits in (3, 4, 6))
SIZES = ("2.5", "3.0", "3.5")
RULERS = {
    "digits": "fd:digits", "EfficientNet": "fd:efficientnet-lite0", "KID EfficientNet": "kid:efficientnet-lite0",
    "PSNR": "psnr", "cosine": "cosine", "classifier agreement": "agreement", "Inception Score": "inception_score",
}  # fmt: skip
HIGHER = ("PSNR", "cosine", "classifier agreement", "Inception Score")
RUINED = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["digits-dit", "digits-sd"])
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, out = arguments.model, arguments.out / arguments.model
    recipes = [f"recipe-{size}={ROOT / 'recipes' / f'{model}-{size}bit-a16.yaml'}" for size in SIZES]
    asked = Asked(
        model, (*recipes, *SCHEMES), out, IMAGES, DRAWS, STEPS, None, "digits,efficientnet-lite0", None,
        f"recipe-{SIZES[1]}", None, False, None,
    )  # fmt: skip
    print(make_table(asked))
    record = summary(read_json(out / "table.json", version=1))
    record |= {
        "model": model,
        "machine": f"{platform.machine()}, {cores()} cores",
        "date": datetime.date.today().isoformat(),
    }
    write_json(ROOT / "eval" / "results" / f"second_ruler_{model}.json", record)
    for name, found in record["agreement"].items():
        print(name, found)


def summary(table: dict[str, Any]) -> dict[str, Any]:
    """Return the table without its per-image parts, and how alike the rulers order its rows."""
    rows = [row for row in table["rows"] if row["row"] != "full precision"]
    sound = [row for row in rows if row["mean"][RULERS["digits"]] < RUINED]
    return {
        "version": 1,
        "protocol": table["protocol"],
        "notes": table["notes"],
        "rows": {row["row"]: {"mean": row["mean"], "sd": row["sd"]} for row in table["rows"]},
        "agreement": agreement(rows),
        f"agreement_of_rows_below_{RUINED}": agreement(sound) if len(sound) > 2 else None,
        "agreement_per_draw": [agreement(rows, draw) for draw in range(len(DRAWS))],
        "manifest": table["manifest"]["sha256"],
        "versions": table["manifest"]["versions"],
    }


def agreement(rows: list[dict[str, Any]], draw: int | None = None) -> dict[str, Any]:
    """Return the rank agreement of every pair of rulers, of the means or of one draw."""
    of = [row["mean"] if draw is None else row["draws"][draw] for row in rows]
    return rank_agreement({name: [row[key] for row in of] for name, key in RULERS.items()}, higher=HIGHER)


if __name__ == "__main__":
    main()
