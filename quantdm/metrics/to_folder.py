"""Generate to a folder: one file per image, one generator per image, any number of processes, resumed after a kill."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from quantdm.activations.hooks import activation_spec
from quantdm.errors import QuantDMError
from quantdm.files import atomic_path, check_output, digest, read_json, save_tensors, write_json
from quantdm.machine import versions
from quantdm.metrics.manifest import MANIFEST, VERSION, lacks_frames
from quantdm.metrics.videos import are_videos
from quantdm.pipelines.checks import check_generates
from quantdm.pipelines.fingerprint import dtype_of, fingerprint_part
from quantdm.pipelines.generate import as_pictures, generate_batches
from quantdm.pipelines.loading import DiffusionPipeline
from quantdm.pipelines.parts import find_denoisers
from quantdm.pipelines.protocol import Protocol
from quantdm.pipelines.text_memory import memoized_text_encoders
from quantdm.progress import bar


def shard_of_environment() -> tuple[int, int]:
    """Return (number, count) of this process as `accelerate launch` or `torchrun` set them; (0, 1) without them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def share(count: int, shard: tuple[int, int]) -> range:
    """Return the images that a process makes: neighbours, shares that differ by one at most.

    Raises:
        QuantDMError: there is no such share.
    """
    number, of = shard
    if not 0 <= number < of:
        raise QuantDMError(f"shard: got {number}/{of}, expected a number from 0 to {of - 1}")
    return range(count * number // of, count * (number + 1) // of)


def identity(pipe: DiffusionPipeline) -> dict[str, str]:
    """Return the hash of every part of a pipeline."""
    return {name: fingerprint_part(part) for name, part in sorted(pipe.components.items()) if part is not None}


def computed_in(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return what images depend on beside weights and settings: dtypes, and how activations are rounded."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    specs = {name: activation_spec(part) for name, part in find_denoisers(pipe).items()}
    rounded = {name: spec.model_dump(mode="json") for name, spec in specs.items() if spec is not None}
    return {"dtypes": {name: dtype_of(part) for name, part in parts.items()}, "activations": rounded}


def manifest_of(
    pipe: DiffusionPipeline, protocol: Protocol, seeds: Sequence[int], steps: int, *, latents: bool = False
) -> dict[str, Any]:
    """Return what the images of a folder depend on, with a hash of it: weights, protocol, prompts, seeds, versions."""
    asked = protocol.conditions
    prompts = [str(asked[i % len(asked)]) for i in range(len(seeds))] if asked else None
    told = protocol.model_dump(mode="json")
    weights, computed = identity(pipe), computed_in(pipe)
    same = digest(type(pipe).__name__, weights, computed, told, steps, [seeds[0], len(seeds)], latents)
    return {
        "version": VERSION,
        "identity": same,  # of what decides the images; not of versions
        "pipeline": type(pipe).__name__,
        "weights": weights,
        **computed,
        "protocol": digest(told),
        "argument": protocol.argument,
        "steps": steps,
        "seeds": f"{seeds[0]}...{seeds[-1]}",
        "images": len(seeds),
        "latents": latents,
        "prompts": prompts,
        "versions": versions(),
    }


def generate_to_folder(
    pipe: DiffusionPipeline,
    protocol: Protocol,
    seeds: range,
    folder: Path,
    *,
    steps: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
    shard: tuple[int, int] = (0, 1),
    latents: bool = False,
    what: str = "generate",
) -> int:
    """Make image i from seed i and write it as `00000i.png`, beside `manifest.json`; what is there stays.

    Args:
        pipe: the pipeline.
        protocol: what is asked for; image i is given what the protocol says of image i.
        seeds: neighbours, one per image.
        folder: where to; of this pipeline, protocol and seeds only.
        steps: denoising steps (None: the protocol's).
        batch_size: images at once at most; small images of small pipelines are the same bit by bit whatever it is, and
            larger ones to rounding.
        shard: number and count of this process; all write to one folder.
        latents: write what the denoiser made, as `00000i.safetensors`, instead of pictures.
        what: shown beside the bar.

    Returns:
        How many images this process made.

    Raises:
        QuantDMError: the pipeline cannot make them, or the folder holds images of something else.
    """
    if latents:
        protocol = protocol.model_copy(update={"output": "latent", "version": 2})
    check_generates(pipe, protocol)
    folder = check_output(folder, folder=True)
    manifest = manifest_of(pipe, protocol, seeds, steps or protocol.steps, latents=latents)
    _claim(folder, manifest)
    mine = share(len(seeds), shard)
    lacks = [i for i in mine if not _path(folder, i, latents).is_file()]
    if not lacks and len(mine) and not latents and lacks_frames(read_json(folder / MANIFEST)):
        lacks = [mine[0]]  # of an older quantdm: one video says how many frames they have
    with bar(len(mine), what) as progress, memoized_text_encoders(pipe):
        progress.update(len(mine) - len(lacks))
        for start, stop in _runs(lacks):
            at = start
            batches = generate_batches(
                pipe, protocol, seeds[start:stop], steps=steps, first=start, batch_size=batch_size,
                lots=True,
            )  # fmt: skip
            for found in batches:
                if are_videos(found.images, protocol):
                    _tell_frames(folder, found.images.shape[1])
                for image in found.images:
                    _write(folder, at, image, protocol, latents)
                    at += 1
                progress.update(len(found.images))
    return len(lacks)


def _claim(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, or check that the one that is there is of the same images."""
    path = folder / MANIFEST
    others = folder.is_dir() and any(not each.name.startswith(".") for each in folder.iterdir())
    if path.is_file():  # after the look at the others: another process may have started the folder just now
        if read_json(path, version=VERSION)["identity"] != manifest["identity"]:
            raise QuantDMError(
                f"{folder}: holds images of another pipeline, protocol, number of steps or seeds; choose another folder"
            )
        return
    if others:
        raise QuantDMError(f"{folder}: is not empty and has no {MANIFEST}; choose another folder")
    write_json(path, manifest)


def _tell_frames(folder: Path, frames: int) -> None:
    """Write into the manifest how many frames a picture holds; nobody knows before the first video is there."""
    record = read_json(folder / MANIFEST, version=VERSION)
    if record.get("frames") != frames:
        write_json(folder / MANIFEST, {**record, "frames": frames})


def _path(folder: Path, index: int, latents: bool) -> Path:
    return folder / f"{index:06d}.{'safetensors' if latents else 'png'}"


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of neighbouring indices."""
    start = 0
    for at in range(1, len(indices) + 1):
        if at == len(indices) or indices[at] != indices[at - 1] + 1:
            yield indices[start], indices[at - 1] + 1
            start = at


def _write(folder: Path, index: int, image: torch.Tensor, protocol: Protocol, latents: bool) -> None:
    """Write one image, whole or not at all; the frames of a video stand below each other."""
    from PIL import Image

    path = _path(folder, index, latents)
    if latents:
        save_tensors(path, {"latents": image}, {"kind": "latents"})
        return
    pixels = torch.cat([*as_pictures(image[None], protocol)], 1).permute(1, 2, 0)
    with atomic_path(path) as temporary:
        Image.fromarray(pixels.squeeze(-1).numpy()).save(temporary, format="PNG")
