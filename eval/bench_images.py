"""What error feedback is worth in images: fid_fp of 2 and 3 bits on the reference pipelines, three draws each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quantdm import get_denoiser, list_layers, load_pipeline, load_protocol
from quantdm.activations.moments import gather_moments
from quantdm.machine import fast_dtype
from quantdm.metrics import load_extractor
from quantdm.metrics.samples import Draw, compare, draw_samples
from quantdm.metrics.statistics import mean_and_sd, spread
from quantdm.pipelines.generate import calibration_calls
from quantdm.runs.bank import WeightBank
from quantdm.schemes import Scheme

IMAGES, STEPS, DRAWS = 500, 10, (701, 702, 703)
SCHEMES = tuple(
    Scheme.parse(f"{method}-channel-{bits}{suffix}")
    for bits in (2, 3)
    for method in ("uniform", "kmeans")
    for suffix in ("", "-feedback")
)
CALIBRATION_IMAGES, CALIBRATION_STEPS = 16, 10


def measure_images(_: Path, folder: Path, models: Sequence[str]) -> dict[str, Any]:
    """Return per pipeline and scheme the mean and the standard deviation of fid_fp and psnr_fp over draws."""
    record: dict[str, Any] = {
        "settings": {
            "images": IMAGES,
            "steps": STEPS,
            "draws": list(DRAWS),
            "calibration": f"{CALIBRATION_IMAGES} images x {CALIBRATION_STEPS} steps, seeds from 0",
        }
    }
    print(f"\n{'fid_fp, mean ± sd of draws':<44}{'fid_fp':>18}{'psnr_fp':>9}")
    for name in [model for model in models if model != "random-dit"]:  # that one makes no images
        protocol, float_pipe = load_protocol(name), load_pipeline(name)
        float_denoiser = get_denoiser(float_pipe)
        layers = list_layers(float_denoiser)
        calls = calibration_calls(float_pipe, protocol, range(CALIBRATION_IMAGES), steps=CALIBRATION_STEPS)
        moments = gather_moments(float_denoiser, calls, [layer.name for layer in layers])
        bank = WeightBank(folder / name, layers, SCHEMES).build(float_denoiser, moments=moments)
        pipe, extractor = load_pipeline(name, torch_dtype=getattr(torch, fast_dtype())), load_extractor("digits")
        draws = [Draw(seed, IMAGES, STEPS) for seed in DRAWS]
        references = [draw_samples(pipe, protocol, extractor, draw) for draw in draws]
        for scheme in SCHEMES:
            with bank.applied(get_denoiser(pipe), {layer.name: scheme for layer in layers}):
                samples = [draw_samples(pipe, protocol, extractor, draw) for draw in draws]
            rows = [compare(s, reference) for s, reference in zip(samples, references, strict=True)]
            figures = mean_and_sd(rows)
            record.setdefault(name, {})[scheme.label] = figures
            fid, sd, psnr = figures["mean"]["fid_fp"], figures["sd"]["fid_fp"], figures["mean"]["psnr_fp"]
            print(f"{name:<13}{scheme.label:<31}{spread(fid, sd):>18}{psnr:>9.1f}", flush=True)
    return record
