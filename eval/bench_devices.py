"""Trials per minute on a processor and on accelerators: the embedded pipelines, and a random one of PixArt's size.

    python eval/bench_devices.py                          # all; wants a quiet machine, half an hour
    python eval/bench_devices.py --models digits-dit --devices cpu:1 cuda:1 cuda:4     # device:workers
    python eval/bench_devices.py --models digits-dit --devices cpu:2 ray:2      # Ray: a cluster of its own here

A trial is what a search measures: the images of one random configuration of a bank, and their figures against full
precision. Workers are opened and have measured one configuration each before time is taken; the batch is found from
memory. PixArt's pipeline is random, at 64 x 64 latents, with a tiny text encoder and decoder.
Writes eval/results/bench_devices.json; what is not asked for stays.
"""

import argparse
import datetime
import json
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from quantdm import Protocol, Scheme
from quantdm.files import read_json, write_json
from quantdm.machine import accelerator, cores, memory_gb, versions
from quantdm.metrics.samples import Draw
from quantdm.pipelines.known import known_pipelines
from quantdm.pipelines.sizes import auto_batch
from quantdm.pipelines.subject import Subject, look_at
from quantdm.runs.engines.choice import open_engine
from quantdm.runs.evaluator import Job
from quantdm.runs.run import Run
from quantdm.runs.search import start_run
from quantdm.runs.stages import build_bank

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.tiny_parts import decoder, encoder, tokenizer

OUT, VERSION = Path(__file__).parent / "results" / "bench_devices.json", 1
RANDOM, RAY = "pixart-sized", "ray"
OPTIONS = [Scheme.parse(label) for label in ("uniform-channel-4", "uniform-channel-8")]
SECONDS, ROUNDS, SEED = 60.0, 100, 11  # trials go on for so long, or until so many a worker
PIXART = {"sample_size": 64, "caption_channels": 32, "use_additional_conditions": False}
PROTOCOL = Protocol(
    version=2, argument="prompt", values=["a red barn", "two owls"], steps=4, features="pyramid", resolution=128,
)  # fmt: skip
IMAGES, STEPS = 8, 4  # of a trial of the random pipeline


def random_pipeline(folder: Path) -> Path:
    """Write a random pipeline of PixArt-XL/2's size; return where."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        denoiser: Any = diffusers.PixArtTransformer2DModel(**PIXART)
    pipe = diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer("t5", length=120), text_encoder=encoder("t5"), vae=decoder("kl"),
        transformer=denoiser.to(device="cpu", dtype=torch.bfloat16),
        scheduler=diffusers.DPMSolverMultistepScheduler(),  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    pipe.to(dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def open_run(model: str, device: str, folder: Path) -> tuple[Run, Subject]:
    """Start a run of a model on a device, with its bank."""
    own = model == RANDOM
    place = random_pipeline(folder / "pipeline") if own else model
    subject = look_at(place, device=device, dtype="bfloat16" if own else None)
    run, subject = start_run(
        subject, folder / "run", target_bits=5.0, trials=30, options=OPTIONS, protocol=PROTOCOL if own else None
    )
    build_bank(run, subject)
    return run, subject


def jobs(run: Run, subject: Subject, count: int) -> list[Job]:
    """Return trials of random configurations."""
    rng = np.random.default_rng(SEED)
    images, steps = (IMAGES, STEPS) if run.settings.model not in known_pipelines() else (300, run.settings.label_steps)
    return [
        Job(Draw(SEED, images, steps), {layer.name: OPTIONS[rng.integers(2)].label for layer in subject.layers})
        for _ in range(count)
    ]


def measure(run: Run, subject: Subject, engine_name: str, workers: int) -> dict[str, Any]:
    """Return trials per minute with so many workers."""
    with open_engine(run, subject, engine_name, workers=workers, batch_size="auto") as engine:
        todo = jobs(run, subject, engine.workers * (ROUNDS + 1))
        list(engine.map("prepare", [todo[0].draw] * 2)) if engine.workers > 1 else engine.local.prepare(todo[0].draw)
        list(engine.map("measure", todo[: engine.workers]))  # workers that are open, kernels that are loaded
        start, done = time.monotonic(), 0
        for _ in engine.map("measure", todo[engine.workers :]):
            done += 1
            if time.monotonic() - start > SECONDS:
                break
        took = time.monotonic() - start
    return {
        "workers": engine.workers,
        "trials": done,
        "seconds": round(took, 2),
        "per_minute": round(60 * done / took, 1),
        "machine": f"{platform.machine()}, {cores()} cores, {memory_gb():.0f} GB, {accelerator()}",
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }


def device_of(place: str) -> str:
    """Return the device of a place; a cluster of its own here works on processors."""
    name = place.partition(":")[0]
    return "cpu" if name == RAY else name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=[*known_pipelines(), RANDOM])
    usual = ["cpu:1", f"cpu:{cores()}", *(["cuda:1", "cuda:4"] if torch.cuda.is_available() else [])]
    parser.add_argument("--devices", nargs="*", default=usual, help="device:workers, of one device, or ray:workers")
    parser.add_argument("-o", "--out", type=Path, default=OUT)
    given = parser.parse_args()
    record = read_json(given.out, version=VERSION) if given.out.is_file() else {"version": VERSION, "rows": {}}
    torch.set_num_threads(1)
    for model in given.models:
        for device in dict.fromkeys(map(device_of, given.devices)):
            folder = Path(tempfile.mkdtemp(prefix="bench-devices-"))
            run, subject = open_run(model, device, folder)
            for place in given.devices:
                if device_of(place) == device:
                    name, _, workers = place.partition(":")
                    row = measure(run, subject, "ray" if name == RAY else "local", int(workers))
                    row |= {"dtype": run.settings.dtype, "batch": auto_batch(subject.pipe, run.settings.protocol)}
                    record["rows"][f"{model}, {place}"] = row
                    print(f"{model}, {place}", json.dumps(row), flush=True)
            shutil.rmtree(folder)
    record["trial"] = f"300 images x 8 steps ({RANDOM}: {IMAGES} images x {STEPS} steps, guidance)"
    write_json(given.out, record)


if __name__ == "__main__":
    main()
