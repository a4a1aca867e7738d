"""What the command line shows: layers, attributions, image grids, measurements, the machine."""

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from quantdm.denoisers.layers import list_layers
from quantdm.denoisers.pipeline import generate, get_denoiser, known_pipelines, load_pipeline
from quantdm.denoisers.protocol import Protocol, load_protocol
from quantdm.errors import QuantDMError
from quantdm.files import atomic_path
from quantdm.metrics import relative_error
from quantdm.modules import packed_layers
from quantdm.progress import bar
from quantdm.quantizers import QuantizedWeight, quantize_weight
from quantdm.recipe import Provenance, Recipe, check_layers
from quantdm.schemes import ORIGINAL_BITS, QuantConfig, Scheme
from quantdm.search import stages
from quantdm.search.evaluation import Draw, evaluate
from quantdm.search.run import Run, cores, fast_dtype, versions
from quantdm.search.search import default_protocol, model_name
from quantdm.surrogates import Attribution, SearchSpace, select

# ----------------------------------------------------------------------------------------------------------- layers


def inspect_layers(model: str, *, scheme: str | None = None, recipe: Recipe | None = None) -> dict[str, Any]:
    """Return one record per quantizable layer, with bits and SQNR when a scheme or recipe is given.

    An already quantized pipeline shows the schemes it has (SQNR needs the original weights and is left out).
    """
    denoiser = get_denoiser(load_pipeline(model))
    layers = list_layers(denoiser)
    names = [layer.name for layer in layers]
    packed = packed_layers(denoiser)
    config = QuantConfig.uniform(names, Scheme.parse(scheme)) if scheme is not None else None
    if recipe is not None:
        config = recipe.config
        check_layers(config, names)
    if packed and config is not None:
        raise QuantDMError(f"inspect: {model} is quantized already; leave out --scheme and --recipe to see its layers")
    rows = []
    for layer in layers:
        row: dict[str, Any] = {
            "name": layer.name,
            "op_type": layer.op_type,
            "block": layer.block,
            "shape": list(layer.shape),
            "num_weights": layer.num_weights,
            "quantizers": layer.quantizers,
        }
        chosen = config[layer.name] if config is not None else None
        if layer.name in packed:
            row |= _size(packed[layer.name].quantized)
        elif chosen is not None:
            weight = denoiser.get_parameter(f"{layer.name}.weight").detach()
            quantized = quantize_weight(weight, chosen, split=layer.split, name=layer.name)
            error = relative_error(quantized.dequantize(dtype=torch.float32), weight)
            row |= _size(quantized) | {"sqnr_db": None if error == 0 else round(-10 * float(np.log10(error)), 2)}
        rows.append(row)
    weights = sum(layer.num_weights for layer in layers)
    bits = sum(row.get("num_bits", row["num_weights"] * ORIGINAL_BITS) for row in rows)
    return {
        "model": model,
        "denoiser": type(denoiser).__name__,
        "layers": rows,
        "num_weights": weights,
        "avg_bits": bits / weights,
        "weight_bytes": -(-bits // 8),
    }


def _size(quantized: QuantizedWeight) -> dict[str, Any]:
    return {"scheme": quantized.scheme.label, "num_bits": quantized.num_bits, "nbytes": quantized.nbytes}


def show_layers(record: dict[str, Any]) -> None:
    """Print the record of `inspect_layers` as a table, at most 79 columns wide."""
    table = Table(title=f"{record['model']}: {record['denoiser']}")
    quantized = any("scheme" in row for row in record["layers"])
    table.add_column("layer", overflow="fold")
    for name in ("shape", "scheme", "bits", "dB") if quantized else ("shape", "weights", "op type"):
        table.add_column(name, justify="right", no_wrap=name not in ("op type", "scheme"))
    for row in record["layers"]:
        shape = "x".join(map(str, row["shape"])) + (" (2)" if row["quantizers"] == 2 else "")
        if quantized:
            bits = row.get("num_bits", row["num_weights"] * ORIGINAL_BITS) / row["num_weights"]
            sqnr = row.get("sqnr_db")
            table.add_row(
                row["name"], shape, row.get("scheme", "-"), f"{bits:.3f}", "-" if sqnr is None else f"{sqnr:.1f}"
            )
        else:
            table.add_row(row["name"], shape, f"{row['num_weights']:,}", row["op_type"])
    console = Console(width=79)
    console.print(table)
    console.print(
        f"{len(record['layers'])} layers, {record['num_weights']:,} weights, {record['avg_bits']:.4f} bits per weight, "
        f"{record['weight_bytes'] / 1e6:.3f} MB. (2): fed by a concatenated long skip, one quantizer per half."
    )


# ------------------------------------------------------------------------------------------- attribution, selection


def show_attribution(space: SearchSpace, attributions: dict[str, Attribution]) -> None:
    """Print per operation type how much quality its best and worst options differ by, for every surrogate."""
    types = sorted({layer.op_type for layer in space.layers})
    table = Table(title="value lost by the worst option, summed per operation type")
    table.add_column("operation type")
    table.add_column("weights", justify="right")
    for name in attributions:
        table.add_column(name, justify="right")
    ranges = {name: np.ptp(a.values, axis=1) for name, a in attributions.items()}
    order = sorted(types, key=lambda t: -sum(_of_type(space, r / max(r.sum(), 1e-12), t) for r in ranges.values()))
    for op_type in order:
        weights = sum(layer.num_weights for layer in space.layers if layer.op_type == op_type)
        table.add_row(op_type, f"{weights:,}", *[f"{_of_type(space, r, op_type):.3f}" for r in ranges.values()])
    Console(width=79).print(table)


def _of_type(space: SearchSpace, values: np.ndarray, op_type: str) -> float:
    return float(sum(v for v, layer in zip(values, space.layers, strict=True) if layer.op_type == op_type))


def select_recipe(run: Run, *, target_bits: float, by: str) -> Recipe:
    """Choose a recipe of another size from a run's attributions; it is predicted, not measured, and says so."""
    space, attributions = stages.load_space(run), stages.load_attributions(run)
    if by not in attributions:
        raise QuantDMError(f"by: got {by!r}, expected one of {', '.join(attributions)}")
    choice = select(space, attributions[by].values, target_bits=target_bits)
    return Recipe(
        model=run.settings.model,
        layers=space.config(choice).to_labels(),
        avg_bits=round(float(space.avg_bits(choice)[0]), 6),
        provenance=Provenance(
            source=f"predicted by the {by} surrogate, not measured",
            quantdm=versions().get("quantdm"),
            seed=run.settings.seed,
            trials=run.settings.trials,
            target=f"{target_bits:g} bits per weight",
        ),
    )


# ----------------------------------------------------------------------------------------------------------- images


def protocol_of(model: str, pipe: Any, protocol: str | None) -> Protocol:
    """Return the protocol that was named, else the one that a run or export carries, else the model's shipped one."""
    if protocol is not None:
        return load_protocol(protocol)
    recipe = Path(model) / "recipe.yaml"
    if recipe.is_file():
        from quantdm.recipe import load_recipe

        return default_protocol(load_recipe(recipe).model)
    return default_protocol(model_name(pipe))


def generate_grid(
    model: str, out: Path, *, images: int, seed: int, steps: int | None, protocol: str | None, columns: int
) -> Path:
    """Generate images and write them as one PNG."""
    from PIL import Image

    pipe = load_pipeline(model)
    chosen = protocol_of(model, pipe, protocol)
    draw = Draw(seed, images, steps or chosen.steps)
    with bar(images, "generate") as progress:
        pixels = generate(pipe, chosen, draw.seeds, steps=draw.steps, batch_size=50, progress=progress.update)
    grid = image_grid((pixels.clamp(0, 1) * 255).round().to(torch.uint8), columns)
    with atomic_path(out) as temporary:
        Image.fromarray(grid).save(temporary, format="PNG")
    return out


def image_grid(images: torch.Tensor, columns: int) -> np.ndarray:
    """Lay uint8 images [N, 3, H, W] out row by row; return uint8 [rows * H, columns * W, 3]."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    canvas = torch.zeros(rows * columns, c, h, w, dtype=torch.uint8)
    canvas[:n] = images
    return canvas.view(rows, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c).numpy()


def evaluate_model(
    model: str, *, reference: str | None, images: int, seeds: tuple[int, ...], steps: int | None, protocol: str | None
) -> dict[str, Any]:
    """Measure a pipeline by name, in the dtype that is fast here."""
    dtype = getattr(torch, fast_dtype())
    pipe = load_pipeline(model, torch_dtype=dtype)
    full = None if reference is None else load_pipeline(reference, torch_dtype=dtype)
    chosen = protocol_of(model, pipe, protocol)
    return evaluate(pipe, protocol=chosen, reference=full, num_images=images, seeds=seeds, steps=steps)


# ---------------------------------------------------------------------------------------------------------- machine


def examine_machine() -> dict[str, Any]:
    """Return versions, devices and fast paths of this machine."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        **versions(),
        "processor cores": cores(),
        "accelerator": gpu,
        "images are generated in": fast_dtype(),
        "weights stay packed": "in memory and on disk; decoded for each layer when it runs",
        "embedded pipelines": ", ".join(known_pipelines()),
        "capabilities": json.dumps(
            {k: v for k, v in torch.cpu.get_capabilities().items() if k.startswith(("amx", "avx512_bf16")) and v}
        ),
    }
