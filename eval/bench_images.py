"""What calibration and tuning are worth in images: fid_fp of 2 and 3 bits on the reference pipelines, three draws."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from judge import Judge

from quantdm import get_denoiser, list_layers, load_pipeline, load_protocol
from quantdm.activations.moments import gather_moments
from quantdm.bank.weight_bank import WeightBank
from quantdm.hub.export import lossless_dtype
from quantdm.metrics.samples import Draw
from quantdm.metrics.statistics import spread
from quantdm.pipelines.generate import calibration_calls
from quantdm.runs.tuned import TunedWeights
from quantdm.schemes import Scheme
from quantdm.tuning import TuneSettings, tune

IMAGES, STEPS, DRAWS = 500, 10, (701, 702, 703)
PLAIN = tuple(Scheme.parse(f"{method}-channel-{bits}") for bits in (2, 3) for method in ("uniform", "kmeans"))
FED = tuple(scheme.model_copy(update={"calibration": "feedback"}) for scheme in PLAIN)
CALIBRATION = range(64)  # seeds of the trajectories, of the protocol's steps
TRAIN, HELD_OUT = range(10_000, 10_128), range(20_000, 20_032)
TUNE = TuneSettings()


def measure_images(_: Path, folder: Path, models: Sequence[str]) -> dict[str, Any]:
    """Return per pipeline, scheme and stage the mean and the standard deviation of fid_fp and psnr_fp over draws."""
    record: dict[str, Any] = {
        "settings": {
            "images": IMAGES,
            "steps": STEPS,
            "draws": list(DRAWS),
            "calibration": f"{len(CALIBRATION)} images of the protocol's steps, seeds from {CALIBRATION[0]}",
            "tuning": vars(TUNE) | {"images": len(TRAIN)},
        }
    }
    print(f"\n{'fid_fp, mean ± sd of draws':<58}{'fid_fp':>18}{'psnr_fp':>9}")
    for name in [model for model in models if model != "random-dit"]:  # that one makes no images
        record[name] = {}
        for label, stage, figures in _stages(name, folder / name):
            record[name].setdefault(label, {})[stage] = figures
            fid, sd, psnr = figures["mean"]["fid_fp"], figures["sd"]["fid_fp"], figures["mean"]["psnr_fp"]
            print(f"{name:<13}{label:<31}{stage:<14}{spread(fid, sd):>18}{psnr:>9.1f}", flush=True)
    return record


def _stages(name: str, folder: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (scheme without calibration, stage, figures): plain, feedback, refined, and k-means also tuned."""
    protocol, exact = load_protocol(name), load_pipeline(name)
    denoiser = get_denoiser(exact)
    layers = list_layers(denoiser)
    moments = gather_moments(denoiser, calibration_calls(exact, protocol, CALIBRATION), [la.name for la in layers])
    banks = {
        "plain": WeightBank(folder / "plain", layers, PLAIN).build(denoiser),
        "feedback": WeightBank(folder / "fed", layers, FED, sweeps=0).build(denoiser, moments=moments),
        "refined": WeightBank(folder / "refined", layers, FED).build(denoiser, moments=moments),
    }
    train, held_out = (calibration_calls(exact, protocol, seeds) for seeds in (TRAIN, HELD_OUT))
    judge = Judge(name, [Draw(seed, IMAGES, STEPS) for seed in DRAWS])
    for plain, fed in zip(PLAIN, FED, strict=True):
        for stage, bank in banks.items():
            scheme = plain if stage == "plain" else fed
            with bank.applied(judge.denoiser, {layer.name: scheme for layer in layers}):
                yield plain.label, stage, judge.figures()
        if plain.method == "kmeans":
            weights = {layer.name: banks["refined"].get(layer.name, fed) for layer in layers}
            tuned = tune(denoiser, weights, train, held_out, TUNE, others_dtype=lossless_dtype(denoiser))
            with TunedWeights(tuned.weights, tuned.others).applied(judge.denoiser):
                yield plain.label, "tuned", judge.figures()
