"""What do activations of few bits cost, and what repairs them? Plain pipelines and ones with planted outlier channels.

    PYTHONPATH=. python eval/bench_activations.py digits-dit     # writes eval/results/activations_digits-dit.json
    PYTHONPATH=. python eval/bench_activations.py digits-dit --bits 4 6 --images 200

Planting multiplies a few channels by 30 where the next weight divides them again (tests/planted_outliers.py): the
function stays, and rounding per tensor collapses. Every row is compared with the same weights without activation
quantization on equal noises: fid_fp and PSNR, mean and sd over draws. Finished rows are kept in a folder beside the
result; run it again to go on.
"""

import argparse
import datetime
import platform
from pathlib import Path
from typing import Any

import torch

import quantdm
from quantdm.activations import set_activation_bits_, usual_activations
from quantdm.activations.choose import choose_activations
from quantdm.files import digest, write_json
from quantdm.machine import versions
from quantdm.metrics import load_extractor
from quantdm.metrics.samples import Draw, Samples, compare, draw_samples
from quantdm.metrics.statistics import mean_and_sd
from quantdm.pipelines.parts import get_denoiser
from quantdm.pipelines.protocol import default_protocol
from quantdm.recipe import ActivationSpec, CalibrationSpec, Recipe
from quantdm.runs.store import TrialStore
from tests.planted_outliers import FACTOR, SHARE, plant_outliers_

OUT = Path(__file__).parent / "results"
BEDS, WEIGHTS = ("plain", "planted"), {"W16": None, "W4": "kmeans-channel-4-feedback"}
VARIANTS = {
    "per tensor": "tensor-{b}",
    "per token": "token-{b}",
    "clipped": "token-{b}-mse",
    "rotated": "token-{b}-hadamard",
    "outlier channels apart": "token-{b}-outliers8",
}
CHOICE = CalibrationSpec(protocol="", images=16, steps=5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["digits-dit", "digits-sd"])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 5, 4])
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--draws", type=int, default=3)
    given = parser.parse_args()
    draws = [Draw(7000 + i, given.images, given.steps) for i in range(given.draws)]
    path = OUT / f"activations_{given.model}.json"
    store, rows = TrialStore(path.with_suffix(".part")), []
    for bed in BEDS:
        for weights, label in WEIGHTS.items():
            wanted = [(bits, name) for bits in given.bits for name in (*VARIANTS, "sensitive at 8", "chosen per layer")]
            keys = {pair: digest(bed, weights, *pair, given.images, given.steps, given.draws) for pair in wanted}
            missing = [pair for pair in wanted if store.get(keys[pair]) is None]
            if missing:
                pipe = _pipe(given.model, bed, label)
                references = [_samples(pipe, given.model, draw) for draw in draws]
                for pair in missing:
                    row = _measure(pipe, given.model, *pair, draws, references)
                    store.put(keys[pair], row)
                    print(f"{bed} {weights} A{pair[0]} {pair[1]}: fid_fp {row['fid_fp']:.4f}", flush=True)
            for bits, name in wanted:
                found = store.get(keys[bits, name]) or {}
                rows.append({"bed": bed, "weights": weights, "bits": bits, "variant": name} | found)
    record = {"version": 1, "model": given.model, "rows": rows, "images": given.images, "steps": given.steps}
    record |= {"draws": [draw.base_seed for draw in draws], "planted": {"share": SHARE, "factor": FACTOR}}
    record |= {"versions": versions(), "machine": platform.processor(), "date": datetime.date.today().isoformat()}
    write_json(path, record)


def _pipe(model: str, bed: str, label: str | None) -> Any:
    """Open the pipeline, plant outliers, quantize the weights."""
    pipe = quantdm.load_pipeline(model)
    if bed == "planted":
        plant_outliers_(get_denoiser(pipe))
    if label is not None:
        calibration = CalibrationSpec(protocol=model, images=16)
        quantdm.apply_recipe(pipe, Recipe(model=model, default=label), calibration=calibration)
        quantdm.set_residency(get_denoiser(pipe), "dense")
    return pipe


def _measure(
    pipe: Any, model: str, bits: int, name: str, draws: list[Draw], references: list[Samples]
) -> dict[str, Any]:
    denoiser = get_denoiser(pipe)
    spec, labels = _spec(pipe, model, bits, name)
    set_activation_bits_(denoiser, spec)
    try:
        found = [compare(_samples(pipe, model, draw), ref) for draw, ref in zip(draws, references, strict=True)]
    finally:
        set_activation_bits_(denoiser, None)
    figures = mean_and_sd(found)
    row = {key: figures["mean"][key] for key in ("fid_fp", "psnr_fp")}
    return row | {f"{key}_sd": figures["sd"][key] for key in ("fid_fp", "psnr_fp")} | {"schemes": labels}


def _spec(pipe: Any, model: str, bits: int, name: str) -> tuple[ActivationSpec, dict[str, int]]:
    """Return the spec of a row and how many layers take which scheme."""
    denoiser = get_denoiser(pipe)
    if name in VARIANTS:
        label = VARIANTS[name].format(b=bits)
        operands = label if name != "outlier channels apart" else f"token-{bits}"
        spec = ActivationSpec(default=label, attention=operands)
    else:
        spec = usual_activations(denoiser, bits)
    if name == "chosen per layer":
        spec, _ = choose_activations(pipe, spec, CHOICE.model_copy(update={"protocol": model}))
        spec = spec.model_copy(update={"attention": f"token-{bits}-hadamard"})
    labels = [str(scheme) for scheme in spec.resolve(quantdm.list_layers(denoiser)).values()]
    return spec, {label: labels.count(label) for label in dict.fromkeys(labels)}


def _samples(pipe: Any, model: str, draw: Draw) -> Samples:
    protocol = default_protocol(model)
    return draw_samples(pipe, protocol, load_extractor(protocol.features), draw, may_be_constant=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
