"""What the command line shows: attributions, image grids, measurements."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from quantdm.denoisers.pipeline import generate, load_pipeline
from quantdm.denoisers.protocol import Protocol, load_protocol
from quantdm.errors import QuantDMError
from quantdm.files import atomic_path
from quantdm.progress import bar
from quantdm.recipe import Provenance, Recipe
from quantdm.search import stages
from quantdm.search.evaluation import Draw, evaluate
from quantdm.search.run import Run, fast_dtype, versions
from quantdm.search.search import default_protocol, model_name
from quantdm.surrogates import Attribution, SearchSpace, select

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
