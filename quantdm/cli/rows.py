"""What `evaluate generate` and `evaluate table` do: open rows, generate them to folders, measure, write the table."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantdm.cli.images import protocol_of
from quantdm.errors import QuantDMError
from quantdm.files import atomic_path, check_output, read_json, write_json
from quantdm.hub.apply import apply_recipe
from quantdm.machine import best_device, fast_dtype, versions
from quantdm.metrics.evaluate import check_draws
from quantdm.metrics.feature_sets import FeatureSet, feature_set, is_statistics
from quantdm.metrics.features import FeatureSpace, default_features, open_features
from quantdm.metrics.images import open_images
from quantdm.metrics.lpips import Lpips
from quantdm.metrics.manifest import MANIFEST
from quantdm.metrics.prompted import ClipScore
from quantdm.metrics.samples import Draw
from quantdm.metrics.table import Table, build_table
from quantdm.metrics.to_folder import generate_to_folder
from quantdm.pipelines.loading import load_pipeline
from quantdm.pipelines.protocol import Protocol
from quantdm.recipe import Recipe, load_recipe
from quantdm.schemes import TABLE_SCHEME, Scheme


@dataclass(frozen=True)
class Asked:
    """The arguments of `evaluate table`."""

    reference: str
    rows: tuple[str, ...]
    out: Path
    images: int
    seeds: tuple[int, ...]
    steps: int | None
    protocol: str | None
    features: str
    real: str | None
    against: str | None
    clip: str | None
    lpips: bool
    batch_size: int | None


def open_row(text: str, reference: str, protocol: str | None) -> tuple[Any, Protocol]:
    """Open a row: a pipeline, or the reference quantized by a recipe (.yaml) or by one scheme everywhere.

    Raises:
        QuantDMError: none of these.
    """
    dtype = getattr(torch, fast_dtype())
    if text.endswith((".yaml", ".yml")):
        pipe = load_pipeline(reference, torch_dtype=dtype)
        chosen = protocol_of(reference, pipe, protocol)
        apply_recipe(pipe, load_recipe(text), insist=True)
    elif "/" not in text and _is_scheme(text):
        pipe = load_pipeline(reference, torch_dtype=dtype)
        chosen = protocol_of(reference, pipe, protocol)
        apply_recipe(
            pipe, Recipe(model=reference, default=Scheme.parse(text).label, embeddings=TABLE_SCHEME.label), insist=True
        )
    else:
        pipe = load_pipeline(text, torch_dtype=dtype)
        chosen = protocol_of(text if protocol is None else reference, pipe, protocol)
    return pipe.to(best_device()) if best_device() != "cpu" else pipe, chosen


def _is_scheme(text: str) -> bool:
    try:
        Scheme.parse(text)
    except QuantDMError:
        return False
    return True


def labelled(rows: tuple[str, ...]) -> dict[str, str]:
    """Return label -> row; a row without a label is called by its last part.

    Raises:
        QuantDMError: two rows with one label.
    """
    found: dict[str, str] = {}
    for text in rows:
        label, equals, row = text.partition("=")
        label, row = (label, row) if equals else (Path(text).name.removesuffix(".yaml"), text)
        if label in found or label == "full precision" or not label or "/" in label:
            raise QuantDMError(f"rows: label {label!r} is given twice or cannot be one; write LABEL=ROW")
        found[label] = row
    return found


def make_table(asked: Asked) -> str:
    """Generate every row to folders, measure them, write the table; return its Markdown."""
    check_draws(asked.images, asked.seeds)
    check_output(asked.out, folder=True)
    rows = {"full precision": asked.reference, **labelled(asked.rows)}
    if asked.against is not None and asked.against not in rows:
        raise QuantDMError(f"against: got {asked.against!r}, expected one of {', '.join(rows)}")
    if asked.lpips:
        Lpips()
    if asked.clip is not None:
        ClipScore(asked.clip)
    first = next(_generated(asked, {"full precision": asked.reference}))
    spaces = [open_features(name) for name in _features(asked, first)]
    real = {} if asked.real is None else {spaces[0].name: _real(asked.real, spaces[0])}
    for _ in _generated(asked, {k: v for k, v in rows.items() if k != "full precision"}):
        pass
    sets = {label: [open_images(_folder(asked, label, seed)) for seed in asked.seeds] for label in rows}
    table = build_table(
        "full precision", sets, spaces, real=real, clip=asked.clip, lpips=asked.lpips,
        manifest=_manifest(asked, rows, spaces),
    )  # fmt: skip
    return write_table(table, asked.out, asked.against or ("full precision" if len(rows) == 1 else [*rows][1]))


def write_table(table: Table, out: Path, against: str | None) -> str:
    """Write a table into a folder as `table` in Markdown, JSON and CSV; return the Markdown."""
    text = table.markdown(against)
    for kind, content in (("md", text), ("csv", table.csv())):
        with atomic_path(out / f"table.{kind}") as temporary:
            temporary.write_text(content, encoding="utf-8")
    write_json(out / "table.json", table.record(against))
    return text


def _folder(asked: Asked, label: str, seed: int) -> Path:
    return asked.out / label.replace(" ", "-") / f"draw-{seed}"


def _generated(asked: Asked, rows: dict[str, str]) -> Iterator[Protocol]:
    """Generate rows, one pipeline in memory at a time; yield the protocol of each."""
    for label, row in rows.items():
        pipe, protocol = open_row(row, asked.reference, asked.protocol)
        for seed in asked.seeds:
            draw = Draw(seed, asked.images, asked.steps or protocol.steps)
            generate_to_folder(
                pipe, protocol, draw.seeds, _folder(asked, label, seed), steps=draw.steps,
                batch_size=asked.batch_size or "auto", what=f"{label}, draw {seed}",
            )  # fmt: skip
        del pipe
        gc.collect()
        yield protocol


def _features(asked: Asked, protocol: Protocol) -> list[str]:
    if asked.features:
        return [name.strip() for name in asked.features.split(",")]
    return list(dict.fromkeys((protocol.features, default_features())))


def _real(path: str, space: FeatureSpace) -> FeatureSet:
    return FeatureSet.load(path) if is_statistics(path) else feature_set(open_images(path), space)


def _manifest(asked: Asked, rows: dict[str, str], spaces: list[FeatureSpace]) -> dict[str, Any]:
    """Return what the table depends on: weights, protocol, prompts, seeds, features, versions."""
    made = {label: read_json(_folder(asked, label, asked.seeds[0]) / MANIFEST) for label in rows}
    first = made["full precision"]
    return {
        "rows": {label: {k: record[k] for k in ("pipeline", "weights", "identity")} for label, record in made.items()},
        "protocol": first["protocol"],
        "prompts": first["prompts"] if first["prompts"] is None else sorted(set(first["prompts"])),
        "seeds": {str(s): read_json(_folder(asked, "full precision", s) / MANIFEST)["seeds"] for s in asked.seeds},
        "steps": first["steps"],
        "images": asked.images,
        "features": {space.name: space.ruler for space in spaces},
        "clip": asked.clip,
        "versions": versions(),
        "dtype": fast_dtype(),
        "device": best_device(),
    }
