"""What do activations of few bits cost, and what repairs them? Plain pipelines and ones with planted outlier channels.

    PYTHONPATH=. python eval/bench_activations.py digits-dit     # writes eval/results/activations_digits-dit.json
    PYTHONPATH=. python eval/bench_activations.py digits-dit --bits 4 6 --weights W16 --draws 1 --images 200

Planting multiplies a few channels by 30 where the next weight divides them again (tests/planted_outliers.py): the
function stays, and rounding per tensor collapses. Every row is compared with full precision on equal noises: fid_fp and
PSNR, mean and sd over draws. Weights lie in the coordinates of their inputs, rotated or equalised (`match_weights`), so
that integers could multiply them. The first two rows have one range for both halves of a long skip, all others two.
"A16" is the weights alone, under full-precision weights the pipeline in bfloat16: what 16 bits cost by themselves.
Every draw of a row is kept in a folder beside the result; run it again to go on, or with more of anything to widen it.
`--known` writes what is known already.
"""

import argparse
import datetime
import platform
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import quantdm
from quantdm.activations import set_activation_bits_, usual_activations
from quantdm.activations.choose import VARIANTS, choose_activations
from quantdm.activations.handover import quantize_input
from quantdm.denoisers.inventory import LayerRecord
from quantdm.files import digest, write_json
from quantdm.machine import versions
from quantdm.metrics import load_extractor
from quantdm.metrics.samples import Draw, Samples, compare, draw_samples
from quantdm.metrics.statistics import mean_and_sd
from quantdm.pipelines.known import known_pipelines
from quantdm.pipelines.parts import get_denoiser
from quantdm.pipelines.protocol import default_protocol
from quantdm.recipe import ActivationScheme, ActivationSpec, CalibrationSpec, Recipe, match_weights
from quantdm.runs.store import TrialStore
from quantdm.schemes import QuantConfig
from tests.planted_outliers import FACTOR, SHARE, plant_outliers_

OUT = Path(__file__).parent / "results"
BEDS = ("plain", "planted")
WEIGHTS = {"W16": "", "W4": "kmeans-channel-4-feedback", "3.0 bits": "recipes/{model}-3.0bit-a16.yaml"}
LABELS = {
    "per tensor": "tensor-{b}",
    "per token": "token-{b}",
    "+ split": "token-{b}",
    "+ outlier channels": "token-{b}-outliers8",
    "+ rotation": "token-{b}-hadamard",
}
UNSPLIT = ("per tensor", "per token")
FEW = ("per tensor", "per token", "chosen per layer")  # rows of 8 and of 5 bits
ROWS = ("+ sensitive at 8", *LABELS, "+ equalisation", "chosen per layer")  # those with the same weights together
ALONE = "A16"
CALIBRATION = {"images": 16, "steps": 5}


class Study:
    """One pipeline's rows: what is asked for, and what is known already."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.model = given, given.model
        self.path = OUT / f"activations_{given.model}.json"
        self.store = TrialStore(self.path.with_suffix(".part"))
        self.draws = [Draw(7000 + i, given.images, given.steps) for i in range(given.draws)]
        self.reference = cache(self._reference)
        self.layers = quantdm.list_layers(get_denoiser(quantdm.load_pipeline(given.model)))
        self.splits = [layer for layer in self.layers if layer.split is not None]
        self.open: tuple[Any, Any, list[Any]] = (None, None, [])  # what the last row opened, and hooks on it

    def rows(self) -> list[dict[str, Any]]:
        """Measure what is missing and return every row; of what is not measured there is none."""
        found = [
            self.row(bed, weights, bits, name)
            for weights in self.given.weights
            for bed in BEDS
            for bits, name in [(16, ALONE), *((bits, name) for name in ROWS for bits in self.bits_of(name))]
        ]
        return [row for row in found if row is not None]

    def bits_of(self, name: str) -> list[int]:
        """Return the bits that a row is measured at; without long skips there is nothing to split."""
        if name == "+ split" and not self.splits:
            return []
        return [bits for bits in self.given.bits if bits in (4, 6) or name in FEW]

    def row(self, bed: str, weights: str, bits: int, name: str) -> dict[str, Any] | None:
        """Return one row; each of its draws is measured if it is not known, or left out with --known."""
        keys = {draw: digest(bed, weights, bits, name, draw.images, draw.steps, draw.base_seed) for draw in self.draws}
        missing = [draw for draw, key in keys.items() if self.store.get(key) is None]
        if self.given.known:
            keys = {draw: key for draw, key in keys.items() if draw not in missing}
            if not keys:
                return None
        elif missing:
            spec = self.spec(bed, bits, name)
            pipe = self.pipe(bed, weights, spec, name in UNSPLIT)
            for draw in missing:
                figures = compare(self.samples(pipe, draw), self.reference(bed, draw))
                own = {key: figures[key] for key in ("fid_fp", "psnr_fp")}
                self.store.put(keys[draw], own | {"schemes": _counted(pipe, spec)})
                print(f"{bed} {weights} A{bits} {name}: fid_fp {own['fid_fp']:.5f}", flush=True)
        kept = [self.store.get(key) or {} for key in keys.values()]
        figures = mean_and_sd([{key: row[key] for key in ("fid_fp", "psnr_fp")} for row in kept])
        row = {"bed": bed, "weights": weights, "bits": bits, "variant": name, "draws": len(keys)}
        row |= figures["mean"] | {f"{key}_sd": value for key, value in figures["sd"].items()}
        return row | {"schemes": kept[0]["schemes"]}

    def spec(self, bed: str, bits: int, name: str) -> ActivationSpec | None:
        """Return the activations of a row; what is chosen by measuring is chosen in full precision, and kept."""
        if bits == 16:
            return None
        if name in LABELS:
            label = LABELS[name].format(b=bits)
            return ActivationSpec(default=label, attention=label.removesuffix("-outliers8"))
        pipe = self.full(bed)
        usual = usual_activations(get_denoiser(pipe), bits)
        if name == "+ sensitive at 8":
            return usual
        key = digest("spec", bed, bits, name)
        if (found := self.store.get(key)) is None:
            spec = ActivationSpec(default=f"token-{bits}") if name == "+ equalisation" else usual
            variants = ("-equalised",) if name == "+ equalisation" else VARIANTS
            calibration = CalibrationSpec(protocol=self.model, **CALIBRATION)
            spec, _ = choose_activations(pipe, spec, calibration, variants=variants)
            spec = spec.model_copy(
                update={"attention": f"token-{bits}{'' if name == '+ equalisation' else '-hadamard'}"}
            )
            self.store.put(key, {"spec": spec.model_dump(mode="json")})
            return spec
        return ActivationSpec.model_validate(found["spec"])

    def full(self, bed: str) -> Any:
        """Open the pipeline in full precision, with planted outliers if the bed has them."""
        pipe = quantdm.load_pipeline(self.model)
        if bed == "planted":
            plant_outliers_(get_denoiser(pipe))
        return pipe

    def pipe(self, bed: str, weights: str, spec: ActivationSpec | None, unsplit: bool) -> Any:
        """Return the pipeline with the weights and activations of a row; opened anew if the last had others."""
        config = self.config(weights, spec)
        key, pipe, hooks = self.open
        for hook in hooks:
            hook.remove()
        if key != (bed, weights, config) or weights == "W16":
            pipe = self.full(bed)
            if weights != "W16":
                calibration = self.recipe(weights).calibration
                quantdm.apply_recipe(pipe, QuantConfig(config), calibration=calibration, insist=True)
                quantdm.set_residency(get_denoiser(pipe), "dense")
            elif spec is None:
                pipe.to(torch.bfloat16)
        set_activation_bits_(get_denoiser(pipe), spec)
        self.open = ((bed, weights, config), pipe, self.unsplit(pipe, spec) if unsplit and spec else [])
        return pipe

    def recipe(self, weights: str) -> Recipe:
        """Return what a name of weights means."""
        source = WEIGHTS[weights].format(model=self.model)
        if "/" in source:
            return quantdm.load_recipe(source)
        return Recipe(model=self.model, default=source, calibration=CalibrationSpec(protocol=self.model, images=16))

    def config(self, weights: str, spec: ActivationSpec | None) -> dict[str, Any]:
        """Return the schemes of weights in the coordinates of their inputs."""
        if weights == "W16":
            return {}
        config = self.recipe(weights).resolve(self.layers)
        return dict(match_weights(config, {} if spec is None else spec.resolve(self.layers)))

    def unsplit(self, pipe: Any, spec: ActivationSpec) -> list[Any]:
        """Give both halves of long skips one range; return the hooks that do it."""
        schemes, hooks, denoiser = spec.resolve(self.layers), [], get_denoiser(pipe)
        apart = dict.fromkeys((layer.name for layer in self.splits), None)
        set_activation_bits_(denoiser, spec.model_copy(update={"layers": {**spec.layers, **apart}}))
        for layer in self.splits:
            hook = _rounds(replace(layer, split=None), schemes[layer.name])
            hooks.append(denoiser.get_submodule(layer.name).register_forward_pre_hook(hook))
        return hooks

    def _reference(self, bed: str, draw: Draw) -> Samples:
        return self.samples(self.full(bed), draw)

    def samples(self, pipe: Any, draw: Draw) -> Samples:
        """Make the images of a draw."""
        protocol = default_protocol(self.model)
        return draw_samples(pipe, protocol, load_extractor(protocol.features), draw, may_be_constant=True)


def _rounds(layer: LayerRecord, scheme: ActivationScheme | None) -> Any:
    """Return a hook that rounds the input of a layer."""
    assert scheme is not None
    return lambda module, args: (quantize_input(args[0], layer, scheme), *args[1:])


def _counted(pipe: Any, spec: ActivationSpec | None) -> dict[str, int]:
    """Return how many layers take which scheme."""
    if spec is None:
        return {}
    labels = [str(scheme) for scheme in spec.resolve(quantdm.list_layers(get_denoiser(pipe))).values()]
    return {label: labels.count(label) for label in dict.fromkeys(labels)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=known_pipelines())
    parser.add_argument("--bits", type=int, nargs="+", default=[6, 4, 8, 5])
    parser.add_argument("--weights", nargs="+", choices=[*WEIGHTS], default=[*WEIGHTS])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--known", action="store_true", help="write what is known already, measure nothing")
    given = parser.parse_args()
    study = Study(given)
    record = {"version": 2, "model": given.model, "rows": study.rows(), "images": given.images, "steps": given.steps}
    record |= {"draws": [draw.base_seed for draw in study.draws], "planted": {"share": SHARE, "factor": FACTOR}}
    record |= {"versions": versions(), "machine": platform.processor() or platform.machine()}
    write_json(study.path, record | {"date": datetime.date.today().isoformat()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
