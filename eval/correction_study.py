"""Does the correction help, on which sampler, at which bits, and does it beat what others published?

python eval/correction_study.py digits-dit W4A4 ddim-0      # one cell, into eval/results/correction_study.json
python eval/correction_study.py                             # all cells that are not there yet
python eval/correction_study.py digits-sd W4A4 dpm++2m --skip mmse tac tcec     # without some of the others' ways

A cell is a pipeline, weights and activations everywhere of one scheme each, and a sampler of 20 steps. The statistics
are fitted once per pipeline and bits, along its own sampler, on activation noise alone, and serve every sampler. Every
variant makes the same images on three draws; figures are against full precision with the same sampler. `ours` takes on
each draw the variant of this project that was best on the other two, no correction included; `variance, independent`
takes the errors of different steps for independent; `weights alone` has no noise of activations. Intervals are those of
the difference to no correction under resampling of images, the same ones for both. What is drawn is kept in a temporary
folder: run it again to go on.
"""

import argparse
import datetime
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import diffusers
import numpy as np
import torch

from quantdm import get_denoiser, list_layers, load_pipeline, load_protocol
from quantdm.activations import set_activation_bits_
from quantdm.activations.moments import gather_moments
from quantdm.bank.weight_bank import WeightBank
from quantdm.correction import RIVALS, VARIANTS, Correction, fit_correction, load_correction
from quantdm.correction.fit import sampling
from quantdm.correction.record import CORRECTION_VERSION
from quantdm.errors import QuantDMError
from quantdm.files import digest, read_json, write_json
from quantdm.machine import accelerator, cores, versions
from quantdm.metrics import frechet_distance, load_extractor
from quantdm.metrics.samples import Draw, Samples, compare, compare_real, draw_samples
from quantdm.pipelines.generate import calibration_calls, generate
from quantdm.recipe import ActivationSpec
from quantdm.schemes import Scheme

OUT = Path(__file__).parent / "results" / "correction_study.json"
VERSION, STEPS, IMAGES, DRAWS, FIT_IMAGES, RESAMPLES = 2, 20, 300, (911, 912, 913), 128, 100
BITS = {
    "W4A4": ("kmeans-channel-4-feedback", {"default": "token-4", "attention": "token-4"}),
    "W4A5": ("kmeans-channel-4-feedback", {"default": "token-5", "attention": "token-5"}),
    "W4A6": ("kmeans-channel-4-feedback", {"default": "token-6", "attention": "token-6"}),
    "W3A6": ("kmeans-channel-3-feedback", {"default": "token-6", "attention": "token-6"}),
    "W2A8": ("kmeans-channel-2-feedback", {"default": "token-8", "attention": "token-8"}),
}
AS_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 1.0}
# Sampler -> scheduler, settings, eta.
SAMPLERS: dict[str, tuple[str, dict[str, Any], float]] = {
    "ddim-0": ("DDIMScheduler", {}, 0.0),
    "ddim-1": ("DDIMScheduler", {}, 1.0),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}, 0.0),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}, 0.0),
    "unipc": ("UniPCMultistepScheduler", {}, 0.0),
    "euler": ("EulerDiscreteScheduler", {}, 0.0),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}, 0.0),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}, 0.0),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}, 0.0),
    "flow-dpm++2m": ("DPMSolverMultistepScheduler", AS_FLOW, 0.0),
    "flow-unipc": ("UniPCMultistepScheduler", AS_FLOW, 0.0),
}
FLOW = tuple(name for name in SAMPLERS if name.startswith("flow"))
# DiTPipeline starts from noise of unit variance, which Euler's sigmas are not; StableDiffusionPipeline passes an eta of
# its own.
SERVED = {
    "digits-dit": ("ddim-0", "ddim-1", "dpm++2m", "ddpm", "unipc"),
    "digits-sd": ("ddim-0", "dpm++2m", "ddpm", "unipc", "euler", "euler-a"),
    "digits-flow": FLOW,
}

INDEPENDENT, WEIGHTS = "variance, independent", "weights alone"


class Study:
    """One pipeline in full precision, its quantized weights, and images of every kind."""

    def __init__(self, name: str, bits: str, skipped: Sequence[str] = (), device: str = "cpu") -> None:
        self.name, self.bits, self.skipped = name, bits, frozenset(skipped)
        self.pipe, self.protocol = load_pipeline(name, device=device), load_protocol(name)
        self.extractor = load_extractor("digits")
        label, spec = BITS[bits]
        self.scheme, self.spec = Scheme.parse(label), ActivationSpec.model_validate(spec)
        denoiser = get_denoiser(self.pipe)
        layers = list_layers(denoiser)
        self.labels = {layer.name: self.scheme for layer in layers}
        state = digest(CORRECTION_VERSION, STEPS, self.protocol.model_dump(mode="json"), *denoiser.parameters())
        top = Path(gettempdir()) / "quantdm-correction-study" / f"{name}-{state}"  # of these weights and rules only
        folder = top / f"{bits}-{FIT_IMAGES}"
        self.kept, self.exact = folder / f"{IMAGES} images", top / f"exact-{IMAGES}"
        moments = gather_moments(
            denoiser, calibration_calls(self.pipe, self.protocol, range(64)), [layer.name for layer in layers]
        )
        self.bank = WeightBank(folder / "bank", layers, [self.scheme]).build(denoiser, moments=moments)
        self.correction = self.fitted(folder / "correction.safetensors")

    @contextmanager
    def quantized(self, *, activations: bool = True) -> Iterator[None]:
        """Quantize the denoiser in place while the context is open."""
        denoiser = get_denoiser(self.pipe)
        with ExitStack() as stack:
            stack.enter_context(self.bank.applied(denoiser, self.labels))
            if activations:
                set_activation_bits_(denoiser, self.spec)
                stack.callback(set_activation_bits_, denoiser, None)
            yield

    def samples(self, what: str, folder: Path) -> list[Samples]:
        """Return the images of every draw, as the pipeline is now; kept in a folder under that name."""
        found = []
        for seed in DRAWS:
            path = folder / f"{what}, draw {seed}.safetensors"
            if not path.is_file():
                draw_samples(self.pipe, self.protocol, self.extractor, Draw(seed, IMAGES, STEPS)).save(path)
            found.append(Samples.load(path))
        return found

    def fitted(self, kept: Path) -> Correction:
        """Return the correction of the activations as they are set, kept in a file."""
        if not kept.is_file():
            half = FIT_IMAGES // 2
            runs = [partial(self._run, range(first, first + half)) for first in (801_000_000, 802_000_000)]
            fit_correction(
                self.pipe, self.quantized, fit_runs=runs, variant="both+variance", model=self.name,
                explained_from=partial(self.quantized, activations=False),
            ).save(kept)  # fmt: skip
        return load_correction(kept)

    def _run(self, seeds: range, pipe: Any) -> torch.Tensor:
        return generate(pipe, self.protocol, seeds, steps=STEPS, batch_size=len(seeds))

    def cell(self, sampler: str) -> dict[str, Any]:
        """Measure every variant on one sampler."""
        scheduler, settings, eta = SAMPLERS[sampler]
        self.pipe.scheduler = getattr(diffusers, scheduler).from_config(self.pipe.scheduler.config, **settings)
        hopeless = {"k", "both"} if not self.correction.k.any() else set()
        corrections = {name: self.correction.with_variant(name) for name in (*VARIANTS, *RIVALS)}
        corrections[INDEPENDENT] = replace(self.correction.with_variant("variance"), age=np.zeros(0))
        with sampling(self.pipe, None, eta=eta):
            exact = self.samples(sampler, self.exact)
        found: dict[str, list[Samples]] = {}
        for name in [name for name in corrections if name not in hopeless | self.skipped]:
            with self.quantized(), sampling(self.pipe, corrections[name], eta=eta):
                found[name] = self.samples(f"{sampler}, {name}", self.kept)
            print(f"  {self.name} {self.bits} {sampler} {name}", flush=True)
        with self.quantized(activations=False), sampling(self.pipe, None, eta=eta):  # what no correction here takes off
            found[WEIGHTS] = self.samples(f"{sampler}, {WEIGHTS}", self.kept)
        return {"significant_k": bool(self.correction.k.any()), "rows": self._rows(exact, found)}

    def _rows(self, exact: list[Samples], found: dict[str, list[Samples]]) -> dict[str, dict[str, Any]]:
        own = [name for name in VARIANTS if name in found]
        fids = {name: [frechet_distance(a.features, b.features) for a, b in zip(draws, exact, strict=True)]
                for name, draws in found.items()}  # fmt: skip
        picked = []
        for draw in range(len(DRAWS)):  # by the other draws
            picked.append(min(own, key=lambda name: sum(v for i, v in enumerate(fids[name]) if i != draw)))
        found = {**found, "ours": [found[name][draw] for draw, name in enumerate(picked)]}
        rows: dict[str, dict[str, Any]] = {}
        for name, draws in found.items():
            figures = [
                {**compare(samples, reference), **compare_real(samples, self.protocol)}
                for samples, reference in zip(draws, exact, strict=True)
            ]
            keys = ("fid_fp", "psnr_fp", "fid_real", "agreement")
            rows[name] = {key: [round(figure[key], 5) for figure in figures] for key in keys}
            if name != "none":
                rows[name]["gain_interval"] = interval(draws, found["none"], exact)
        rows["ours"]["picked"] = picked
        return rows


def interval(found: list[Samples], none: list[Samples], exact: list[Samples]) -> list[float]:
    """Return the 95 % interval of fid_fp(none) - fid_fp(found), mean over draws, under paired resampling of images."""
    generator, gains = torch.Generator().manual_seed(0), []
    for _ in range(RESAMPLES):
        gain = []
        for a, b, reference in zip(found, none, exact, strict=True):
            rows = torch.randint(IMAGES, (IMAGES,), generator=generator)
            at, bt, target = (samples.features[rows] for samples in (a, b, reference))
            gain.append(frechet_distance(bt, target) - frechet_distance(at, target))
        gains.append(float(np.mean(gain)))
    return [round(float(value), 5) for value in np.quantile(gains, [0.025, 0.975])]


def about() -> dict[str, Any]:
    """Return what all cells have in common, and where and when the last one was measured."""
    settings = {"steps": STEPS, "images": IMAGES, "draws": DRAWS, "fit_images": FIT_IMAGES, "resamples": RESAMPLES}
    return {
        "settings": {**settings, "bits": BITS},
        "machine": f"{platform.machine()}, {cores()} cores, {accelerator()}",
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=tuple(SERVED))
    parser.add_argument("bits", nargs="?", choices=BITS)
    parser.add_argument("sampler", nargs="*", choices=[[], *SAMPLERS])
    parser.add_argument("--skip", nargs="*", choices=tuple(RIVALS), default=[])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=OUT, help="a record of its own, where several work side by side")
    options = parser.parse_args()
    for model in (options.model,) if options.model else SERVED:
        for bits in (options.bits,) if options.bits else BITS:
            study = None
            for sampler in options.sampler or SERVED[model]:
                key = f"{model} {bits} {sampler}"
                if sampler not in SERVED[model] or key in known(options.out)["cells"]:
                    continue
                study = study or Study(model, bits, options.skip, options.device)
                cell = study.cell(sampler)
                record = known(options.out)  # another process may have measured a cell meanwhile
                record["cells"][key] = cell | {"device": options.device, "date": datetime.date.today().isoformat()}
                write_json(options.out, record | about())
                print(json.dumps({n: r["fid_fp"] for n, r in cell["rows"].items()}), flush=True)


def known(path: Path) -> dict[str, Any]:
    """Return the cells that are there."""
    return read_json(path, version=VERSION) if path.is_file() else {"version": VERSION, "cells": {}}


if __name__ == "__main__":
    try:
        main()
    except QuantDMError as error:
        raise SystemExit(str(error)) from None
