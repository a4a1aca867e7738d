"""What do quantized embedding tables cost? The shipped recipes of digits-dit with and without a rule for them.

    python eval/table_study.py

Every recipe is calibrated once and measured with its tables as they are, and under each scheme of TABLES: fid_fp and
PSNR on three draws that the search never saw, bytes as an export has them. Run it again to go on.
Result: eval/results/embedding_tables.json.
"""

import datetime
import platform
from pathlib import Path
from typing import Any

import torch

from quantdm import Recipe, Scheme, apply_recipe, get_denoiser, list_tables, load_pipeline, load_protocol, load_recipe
from quantdm.files import read_json, write_json
from quantdm.hub.calibrated import packed_bank
from quantdm.hub.quantize import Bank
from quantdm.hub.size import ExportSize
from quantdm.machine import fast_dtype, versions
from quantdm.metrics import load_extractor
from quantdm.metrics.samples import Draw, Samples, compare, draw_samples
from quantdm.metrics.statistics import mean_and_sd
from quantdm.modules import dense_weights
from quantdm.quantizers import count_bits, quantize_weight

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "eval" / "results" / "embedding_tables.json"
MODEL, SIZES, IMAGES, STEPS = "digits-dit", ("2.5", "3.0"), 500, 20
TABLES = (None, "uniform-channel-8", "kmeans-channel-4", "kmeans-shared-4")
DRAWS = tuple(Draw(101 + i, IMAGES, STEPS) for i in range(3))


def main() -> None:
    result: dict[str, Any] = read_json(RESULT, version=1) if RESULT.is_file() else {"version": 1, "rows": {}}
    protocol, dtype = load_protocol(MODEL), getattr(torch, fast_dtype())
    extractor, references = load_extractor(protocol.features), {}
    result |= {"error": table_errors(), "machine": f"{platform.machine()}, {fast_dtype()}", "versions": versions()}
    result |= {"date": datetime.date.today().isoformat(), "protocol": f"3 draws of {IMAGES} images x {STEPS} steps"}

    def samples(pipe: Any, draw: Draw, what: str) -> Samples:
        return draw_samples(pipe, protocol, extractor, draw, what=what, may_be_constant=False)

    for size in SIZES:
        recipe = load_recipe(ROOT / "recipes" / f"{MODEL}-{size}bit-a16.yaml")
        bank: Bank | None = None
        for label in TABLES:
            name = f"{size} bits, tables {label or 'original'}"
            if name in result["rows"]:
                continue
            references = references or {d: samples(load_pipeline(MODEL, torch_dtype=dtype), d, "fp") for d in DRAWS}
            bank = bank or packed_bank(load_pipeline(MODEL), recipe, None)
            pipe = load_pipeline(MODEL, torch_dtype=dtype)
            apply_recipe(pipe, recipe.model_copy(update={"embeddings": label}), bank=bank, insist=True)
            with dense_weights(get_denoiser(pipe)):
                found = [compare(samples(pipe, draw, name), references[draw]) for draw in DRAWS]
            result["rows"][name] = row_of(recipe, label, found)
            write_json(RESULT, result)
            print(name, result["rows"][name], flush=True)


def row_of(recipe: Recipe, label: str | None, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a recipe, each draw's beside the means, and the bytes of its denoiser."""
    figures = mean_and_sd(found)
    keys = ("fid_fp", "psnr_fp")
    return {
        "denoiser_bytes": ExportSize(load_pipeline(MODEL), embeddings=label).of(recipe.layers),
        **{key: figures["mean"][key] for key in keys},
        **{f"{key}_sd": figures["sd"][key] for key in keys},
        "fid_fp_of_draws": [row["fid_fp"] for row in found],
    }


def table_errors() -> dict[str, dict[str, float]]:
    """Return scheme -> bits per entry, and the relative squared error of the rows that are not all zeros."""
    denoiser, found = get_denoiser(load_pipeline(MODEL)), {}
    tables = {t.name: denoiser.get_parameter(f"{t.name}.weight").detach() for t in list_tables(denoiser)}
    for label in (*filter(None, TABLES), "uniform-channel-8-symmetric", "uniform-channel-4", "kmeans-channel-8"):
        scheme, error, size = Scheme.parse(label), 0.0, 0.0
        for weight in tables.values():
            decoded = quantize_weight(weight, scheme).dequantize()
            error, size = error + float((decoded - weight).square().sum()), size + float(weight.square().sum())
        entries = sum(weight.numel() for weight in tables.values())
        bits = sum(count_bits(weight.shape, scheme) for weight in tables.values())
        found[label] = {"bits": round(bits / entries, 3), "relative error": float(f"{error / size:.3g}")}
    return found


if __name__ == "__main__":
    main()
