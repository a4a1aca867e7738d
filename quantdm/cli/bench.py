"""What `bench` does: open a pipeline, run a trajectory, time its denoiser in every residency."""

from pathlib import Path
from typing import Any

import torch

from quantdm.activations import activation_spec, set_activation_bits_
from quantdm.cli.images import protocol_of
from quantdm.errors import QuantDMError
from quantdm.hub import apply_recipe
from quantdm.machine import cores, cpu_features, fast_dtype
from quantdm.metrics.timing import Timing, time_calls, time_residencies
from quantdm.modules import RESIDENCIES, packed_layers
from quantdm.pipelines.generate import calibration_calls
from quantdm.pipelines.loading import load_pipeline, model_name
from quantdm.pipelines.parts import get_denoiser
from quantdm.progress import bar
from quantdm.recipe import ActivationSpec, Recipe, load_recipe

DEFAULT_SCHEME, DEFAULT_ACTIVATIONS = "kmeans-channel-4", "token-8"


def bench_model(
    model: str,
    *,
    scheme: str | None,
    recipe: Path | None,
    activations: str | None,
    images: int,
    steps: int | None,
    protocol: str | None,
) -> dict[str, Any]:
    """Return what `bench` prints: the machine, and one row per residency."""
    pipe = load_pipeline(model, torch_dtype=getattr(torch, fast_dtype()))
    denoiser: Any = get_denoiser(pipe)
    packed = bool(packed_layers(denoiser))
    if packed and (scheme or recipe):
        raise QuantDMError(f"{model}: is quantized already; leave out --scheme and --recipe")
    before = activation_spec(denoiser)
    set_activation_bits_(denoiser, None)
    calls = calibration_calls(pipe, protocol_of(model, pipe, protocol), range(images), steps=steps)
    rows: list[Timing] = []
    with bar(len(RESIDENCIES) + (not packed), "bench") as progress:
        if not packed:
            rows.append(time_calls(denoiser, calls, "original"))
            progress.update()
            name = model_name(pipe)
            apply_recipe(
                pipe,
                load_recipe(recipe) if recipe else Recipe(model=name, default=scheme or DEFAULT_SCHEME),
                insist=True,
            )
            before = activation_spec(denoiser)
        given = (
            ActivationSpec(default=activations)
            if activations
            else before or ActivationSpec(default=DEFAULT_ACTIVATIONS)
        )
        set_activation_bits_(denoiser, given)
        rows += time_residencies(denoiser, calls, progress=progress.update)
    return _record(model, denoiser, given, images, len(calls), rows)


def _record(
    model: str, denoiser: Any, given: ActivationSpec, images: int, calls: int, rows: list[Timing]
) -> dict[str, Any]:
    return {
        "model": model,
        "machine": f"{cores()} cores ({', '.join(cpu_features()) or 'no vector extensions'})",
        "device": str(denoiser.device),
        "threads": torch.get_num_threads(),
        "dtype": str(denoiser.dtype).removeprefix("torch."),
        "weights": sorted({layer.label for layer in packed_layers(denoiser).values()}),
        "activations": given.description,
        "images": images,
        "calls": calls,
        "rows": [vars(row) for row in rows],
    }


def bench_text(record: dict[str, Any]) -> str:
    """Return the record as lines of at most 79 columns."""
    schemes = record["weights"]
    shown = ", ".join(schemes[:2]) + (f" and {len(schemes) - 2} more" if len(schemes) > 2 else "")
    lines = [
        f"{record['model']}: {record['device']}, {record['threads']} threads, {record['dtype']}",
        f"weights {shown}; {record['activations']}"[:79],
        f"{'residency':<12}{'ms per step':>14}{'memory MB':>12}{'distance to the simulation':>30}",
        "-" * 68,
    ]
    for row in record["rows"]:
        distance = "-" if row["distance"] is None else f"{row['distance']:.1e}"
        lines.append(f"{row['residency']:<12}{row['ms']:>14.1f}{row['nbytes'] / 1e6:>12.1f}{distance:>30}")
    return "\n".join(lines)
