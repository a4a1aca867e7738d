"""Measure the expensive stages of a calibrated search of an SDXL-sized random denoiser on this machine: time, memory.

    python eval/bench_search.py --folder DIR     # DIR/sdxl as eval/bench_streaming.py makes it (--keep)

The whole search takes days on two cores, so single pieces are measured and multiplied: opening, one image of one step
at 64 x 64 latents, moments and options of layers of four widths, the sensitivity of one layer. The text encoders and
the decoder are tiny. Figures go to eval/results/bench_search.json; what is multiplied is called `estimated`.
"""

import argparse
import datetime
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch

from quantdm import Protocol, Scheme
from quantdm.activations.moments import gather_moments
from quantdm.bank.weight_bank import WeightBank
from quantdm.denoisers.calls import record_calls, replay
from quantdm.files import write_json
from quantdm.machine import cores, memory_gb, versions
from quantdm.pipelines.generate import generate
from quantdm.pipelines.subject import Subject, look_at
from quantdm.runs.settings import FULL, FULL_TRIALS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.tiny_parts import decoder, encoder, tokenizer

OUT = Path(__file__).parent / "results" / "bench_search.json"
PROTOCOL = Protocol(
    version=2, argument="prompt", values=["a red barn", "two owls"], steps=1, features="pyramid", resolution=128,
    guidance_scale=1.0,
)  # fmt: skip
OPTIONS = [Scheme.parse(label) for label in ("kmeans-channel-4-feedback", "uniform-channel-4-importance")]
LAYERS = (
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",  # 1,280 columns
    "mid_block.attentions.0.transformer_blocks.0.ff.net.2",  # 5,120
    "mid_block.resnets.0.conv1",  # 11,520
    "up_blocks.0.resnets.0.conv1",  # 23,040: the widest
)


def make(folder: Path) -> Path:
    """Write a pipeline around the denoiser: tiny text encoders of its widths, a tiny decoder; return its folder."""
    place = folder / "sdxl-pipeline"
    if not (place / "model_index.json").is_file():
        pipe = diffusers.StableDiffusionXLPipeline(
            vae=decoder("kl"), text_encoder=encoder("clip", hidden_size=768),
            text_encoder_2=encoder("clip-projection", hidden_size=1280, projection_dim=1280),
            tokenizer=tokenizer("clip"), tokenizer_2=tokenizer("clip"), add_watermarker=False,
            unet=_placeholder(),
            scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear"),  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        pipe.to(dtype=torch.bfloat16).save_pretrained(place)
        shutil.rmtree(place / "unet")
        os.symlink((folder / "sdxl").resolve(), place / "unet")
    return place


def _placeholder() -> diffusers.UNet2DConditionModel:
    """Return the least network of the right class: the real one takes its place on disk."""
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
        layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
    )  # fmt: skip


def timed(record: dict[str, Any], name: str, do: Callable[[], Any]) -> Any:
    """Do something, and note seconds, seconds of the processor, and the peak of the process so far."""
    start, began = time.monotonic(), time.process_time()
    found = do()
    record[name] = {
        "seconds": round(time.monotonic() - start, 2),
        "cpu_seconds": round(time.process_time() - began, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
    }
    print(name, record[name], flush=True)
    return found


def stages(subject: Subject, record: dict[str, Any], folder: Path) -> None:
    """Measure the pieces of every stage."""
    denoiser: Any = subject.denoiser
    with record_calls(denoiser) as recording:
        timed(record, "one image, one step", lambda: generate(subject.pipe, PROTOCOL, [1]))
    moments = {  # of all layers first, to files, as a run does
        name: timed(
            record,
            f"moments: {name}",
            partial(gather_moments, denoiser, recording.calls, [name], folder=folder / "moments"),
        )
        for name in LAYERS
    }
    for name in LAYERS:
        layer = next(layer for layer in subject.layers if layer.name == name)
        bank = WeightBank(folder / "bank", [layer], OPTIONS, sweeps=0)
        timed(record, f"two options: {name}", partial(bank.build, denoiser, moments=moments[name], workers=1))
    timed(record, "sensitivity: one layer, one scheme, one call", lambda: replay(denoiser, recording.calls))


def estimated(subject: Subject, record: dict[str, Any]) -> dict[str, Any]:
    """Return hours of the stages of a usual search, from the pieces; in processor hours of one core."""
    step = record["one image, one step"]["cpu_seconds"]
    sizes = {layer.name: layer.num_weights for layer in subject.layers}
    known = [(sizes[name], record[f"two options: {name}"]["cpu_seconds"]) for name in LAYERS]
    rate = sum(seconds for _, seconds in known) / sum(size for size, _ in known) / len(OPTIONS)
    columns = [layer.num_weights // layer.shape[0] for layer in subject.layers]
    return {
        "layers": len(sizes),
        "moments_gb_on_disk": round(sum(4 * n * n for n in columns) / 1e9, 1),
        "bank_hours_per_option": round(rate * sum(sizes.values()) / 3600, 2),
        "trials_hours": round(step * FULL_TRIALS * FULL.label_images * FULL.label_steps / 3600, 0),
        "toy_trials_hours": round(step * 30 * 2 / 3600, 2),
        "sensitivities_hours_per_option_and_call": round(step * len(sizes) / 3600, 2),
    }


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where sdxl/ lies, and the pipeline is written")
    folder = parser.parse_args().folder
    place, record = make(folder), {}
    subject = timed(record, "open and look at", lambda: look_at(place, dtype="bfloat16"))
    stages(subject, record, folder)
    model = sum(parameter.nbytes for parameter in subject.denoiser.parameters()) / 1e9
    peak = max(stage["peak_gb"] for stage in record.values())
    found = {"model_gb": round(model, 3), "peak_gb": peak, "above_the_model_gb": round(peak - model, 3)}
    machine = {"cpu": platform.processor() or platform.machine(), "cores": cores(), "memory_gb": memory_gb()}
    result = {"pieces": record, **found, "estimated": estimated(subject, record), "machine": machine}
    said = {"threads": torch.get_num_threads(), "other work on the machine": True, "versions": versions()}
    write_json(OUT, {**result, **said, "date": datetime.date.today().isoformat()})
    for made in (place, folder / "moments", folder / "bank"):
        shutil.rmtree(made)


if __name__ == "__main__":
    main()
