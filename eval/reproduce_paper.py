"""The tables of Qua2SeDiMo and PTQD: the protocol, the time it takes, and the published row beside ours.

    python eval/reproduce_paper.py all --dry-run          # every step offline, on tiny random pipelines; minutes
    python eval/reproduce_paper.py pixart-alpha --weights path/to/PixArt-XL-2-512x512 --captions coco-captions.txt \
        --real val2014.zip --features inception-pytorch-fid:weights.pth --clip path/to/clip \
        --recipe recipes/pixart-alpha-3.4bit.yaml -o reproduce/pixart-alpha
    accelerate launch eval/reproduce_paper.py dit --weights path/to/DiT-XL-2-256 --real imagenet-val.tar \
        --features inception-pytorch-fid --recipe recipes/dit-xl-2-3.5bit.yaml -o reproduce/dit --generate-only

Full precision, one scheme everywhere and the recipe on equal seeds, with FID to real images, distances to full
precision and CLIP score; one table as Markdown, JSON and CSV, with a hashed manifest. Run it again to go on. Real
images that are not square are scaled and cropped to the resolution. LDM-4: give a directory that ClassLDMPipeline
(paper_pipelines.py) saved; its correction is fitted by `quantdm correct` and is not part of the table here.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from paper_pipelines import TINY_RESOLUTION, ClassLDMPipeline, tiny
from paper_protocols import ETA, PAPERS, Paper
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from quantdm import (
    ActivationSpec,
    Protocol,
    apply_recipe,
    get_denoiser,
    list_layers,
    load_pipeline,
    load_recipe,
    set_activation_bits_,
)
from quantdm.cli.rows import write_table
from quantdm.denoisers.example_inputs import infer_inputs
from quantdm.errors import QuantDMError
from quantdm.files import digest, read_json
from quantdm.machine import best_device, fast_dtype, versions
from quantdm.metrics.feature_sets import FeatureSet, feature_set, is_statistics
from quantdm.metrics.features import open_features
from quantdm.metrics.images import open_images
from quantdm.metrics.manifest import MANIFEST
from quantdm.metrics.samples import Draw
from quantdm.metrics.table import build_table
from quantdm.metrics.to_folder import generate_to_folder, shard_of_environment
from quantdm.pipelines.inputs import Lines, resolve
from quantdm.schemes import QuantConfig, Scheme

SEED = 1
DRY_IMAGES, DRY_STEPS = 8, 2
UNIFORM = "uniform-channel-4"
CARD = 125.0  # TFLOP/s: 40 % of what an A100 can do in bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=[*PAPERS, "all"])
    parser.add_argument("--dry-run", action="store_true", help="every step on tiny random pipelines, offline")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--captions", type=Path, help="text file, one per line; not for models of classes")
    parser.add_argument("--real", type=Path, help="folder, archive or statistics of real images")
    parser.add_argument("--features", default="", help="inception-pytorch-fid:PATH for the paper's FID")
    parser.add_argument("--clip", help="CLIP model for CLIP score")
    parser.add_argument("--recipe", type=Path, help="the recipe to measure")
    parser.add_argument("--activation-bits", type=int, choices=[6, 8], help="also with these activations")
    parser.add_argument("--images", type=int, help="fewer than the paper's, e.g. 1000 for a first look")
    parser.add_argument("--tflops", type=float, default=CARD, help="what your GPU reaches, for the expected hours")
    parser.add_argument("--generate-only", action="store_true", help="make images, measure later in one process")
    parser.add_argument("-o", "--out", type=Path, default=Path("reproduce"))
    arguments = parser.parse_args()
    for name in PAPERS if arguments.protocol == "all" else [arguments.protocol]:
        start = time.monotonic()
        announce(name, arguments.tflops)
        if arguments.dry_run:
            print(dry_run(name, arguments.out / "dry-run" / name))
            print(f"dry run of {name}: every step passed, {time.monotonic() - start:.0f} s\n", flush=True)
        else:
            print(reproduce(name, arguments))


def announce(name: str, tflops: float) -> None:
    """Print the protocol, the expected hours per GPU, and the paper's row."""
    paper = PAPERS[name]
    per_step = flops_per_image(paper)
    print(f"{name}: {paper.title}")
    labels = "" if paper.labels is None else f"{paper.labels:,} images per label, "
    print(f"  {labels}{paper.images:,} for tables; {paper.values}; {paper.resolution} px; {paper.settings}")
    for steps in paper.steps:
        hours = paper.images * steps * per_step / (tflops * 1e12) / 3600
        print(
            f"  expected: {hours:.1f} GPU hours per row at {tflops:g} TFLOP/s ({steps} steps, guidance "
            f"{paper.guidance:g}, {per_step / 1e12:.2f} TFLOP a step; denoiser only)"
        )
    for row in paper.rows:
        print(f"  paper: {row}")


def flops_per_image(paper: Paper) -> float:
    """Return the floating-point operations of one step of one image: the denoiser, twice with guidance."""
    kind, config = paper.denoiser
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**config).eval()
        inputs = infer_inputs(model, model.config)
        inputs = {key: _on_meta(value) for key, value in inputs.items()}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**inputs)
    sample = next(v for v in inputs.values() if isinstance(v, torch.Tensor) and v.ndim == 4)
    return counter.get_total_flops() / len(sample) * 2


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {key: _on_meta(item) for key, item in value.items()}
    return type(value)(_on_meta(item) for item in value) if isinstance(value, (list, tuple)) else value


# ------------------------------------------------------------------------------------------------------------ protocol


def protocol_of(paper: Paper, steps: int, values: list[Any], *, resolution: int | None = None) -> Protocol:
    """Return what the paper asks its pipeline for."""
    eta = {"eta": ETA[steps]} if paper.pipeline == "ClassLDMPipeline" and steps in ETA else {}
    sized = paper.argument == "prompt"
    return Protocol(
        version=2, argument=paper.argument, values=tuple(values), call=paper.call | eta, steps=steps,
        guidance_scale=paper.guidance, resolution=(resolution or paper.resolution) if sized else None,
        features="pyramid",
    )  # fmt: skip


def rows_of(
    recipe: Path | None, bits: int | None, denoise: Callable[[], DiffusionPipeline]
) -> dict[str, Callable[[], DiffusionPipeline]]:
    """Return label -> what opens that row, full precision first."""

    def uniform() -> DiffusionPipeline:
        pipe = denoise()
        names = [layer.name for layer in list_layers(get_denoiser(pipe))]
        return apply_recipe(pipe, QuantConfig.uniform(names, Scheme.parse(UNIFORM)), insist=True)

    def with_recipe() -> DiffusionPipeline:
        assert recipe is not None
        return apply_recipe(denoise(), load_recipe(recipe), insist=True)

    best = uniform if recipe is None else with_recipe

    def activated() -> DiffusionPipeline:
        pipe = best()
        set_activation_bits_(get_denoiser(pipe), ActivationSpec(default=f"token-{bits}", attention=f"token-{bits}"))
        return pipe

    rows = {"full precision": denoise, "W4A16 uniform": uniform}
    rows |= {} if recipe is None else {"recipe A16": with_recipe}
    return rows | ({} if bits is None else {f"{'recipe' if recipe else 'W4'} A{bits}": activated})


def measure(
    rows: dict[str, Callable[[], DiffusionPipeline]],
    protocol: Protocol,
    images: int,
    out: Path,
    *,
    real: Path | None,
    features: str,
    clip: str | None,
    side: int,
    generate_only: bool = False,
) -> str:
    """Generate every row, measure it, write the table; return its Markdown."""
    draw = Draw(SEED, images, protocol.steps)
    folders = {label: out / label.replace(" ", "-") for label in rows}
    for label, opened in rows.items():
        pipe = opened()
        generate_to_folder(pipe, protocol, draw.seeds, folders[label], shard=shard_of_environment(), what=label)
        del pipe
    if generate_only:
        return f"images: {out}; run it again without --generate-only to measure them"
    space = open_features(features)
    sets = {label: [open_images(folder)] for label, folder in folders.items()}
    known = {} if real is None else {space.name: _real(real, space, side)}
    manifest = {
        "rows": {label: read_json(folder / MANIFEST)["identity"] for label, folder in folders.items()},
        "protocol": digest(protocol.model_dump(mode="json")),
        "real": None if not known else digest(known[space.name].moments.outer),
        "features": space.ruler,
        "versions": versions(),
    }
    table = build_table("full precision", sets, [space], real=known, clip=clip, manifest=manifest)
    return write_table(table, out, "W4A16 uniform")


def _real(path: Path, space: Any, side: int) -> FeatureSet:
    return FeatureSet.load(path) if is_statistics(path) else feature_set(open_images(path, side=side, rgb=True), space)


def reproduce(name: str, arguments: argparse.Namespace) -> str:
    """Run a paper's protocol on real weights and data."""
    paper = PAPERS[name]
    lacks = [f"--{key}" for key in ("weights", "features") if not getattr(arguments, key)]
    lacks += ["--captions"] if paper.argument == "prompt" and arguments.captions is None else []
    if lacks:
        raise SystemExit(f"error: {name} needs {', '.join(lacks)} ({paper.values}); --dry-run needs nothing")
    values = list(range(1000)) if arguments.captions is None else list(resolve(Lines(lines=str(arguments.captions))))
    dtype = getattr(torch, fast_dtype())

    def opened() -> DiffusionPipeline:
        if paper.pipeline == "ClassLDMPipeline":
            return ClassLDMPipeline.from_pretrained(arguments.weights).to(best_device())
        return load_pipeline(arguments.weights, torch_dtype=dtype, device=best_device())

    rows = rows_of(arguments.recipe, arguments.activation_bits, opened)
    texts = []
    for steps in paper.steps:
        protocol = protocol_of(paper, steps, values)
        text = measure(
            rows, protocol, arguments.images or paper.images, arguments.out / f"{steps}-steps", real=arguments.real,
            features=arguments.features, clip=arguments.clip, side=paper.resolution,
            generate_only=arguments.generate_only,
        )  # fmt: skip
        texts.append(text)
    return "\n".join(texts)


def dry_run(name: str, out: Path) -> str:
    """Take every step of a protocol on a tiny random pipeline of its class: generate, quantize, measure, write."""
    paper = PAPERS[name]
    captions = out / "captions.txt"
    captions.parent.mkdir(parents=True, exist_ok=True)
    captions.write_text("a handwritten one\na handwritten two\n\na handwritten three\n", encoding="utf-8")
    values = list(resolve(Lines(lines=str(captions)))) if paper.argument == "prompt" else list(range(DRY_IMAGES))
    real = out / "real"
    real.mkdir(exist_ok=True)
    rng = torch.Generator().manual_seed(0)
    for i in range(DRY_IMAGES):  # of another size than what is made, as real images are
        noise = torch.randint(0, 256, (20, 28, 3), generator=rng, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(real / f"{i}.png")
    protocol = protocol_of(paper, DRY_STEPS, values, resolution=TINY_RESOLUTION)
    if paper.pipeline == "ClassLDMPipeline":
        protocol = protocol.model_copy(update={"call": {"eta": 1.0}})
    text = measure(
        rows_of(None, 8, lambda: tiny(name)), protocol, DRY_IMAGES, out / "tables", real=real, features="pyramid",
        clip=None, side=TINY_RESOLUTION,
    )  # fmt: skip
    found = read_json(out / "tables" / "table.json")
    if [row["row"] for row in found["rows"]] != ["full precision", "W4A16 uniform", "W4 A8"]:
        raise QuantDMError(f"{name}: the table has other rows than were asked for")
    return "\n".join(line for line in text.splitlines() if line.startswith("|")).split("\n|  |", 1)[0]


if __name__ == "__main__":
    main()
