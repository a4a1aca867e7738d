"""What `generate` and `evaluate` do: open a pipeline by name, make images, measure."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantdm.errors import QuantDMError
from quantdm.files import atomic_path, check_output
from quantdm.machine import fast_dtype
from quantdm.metrics.evaluate import check_draws, evaluate
from quantdm.metrics.samples import Draw
from quantdm.pipelines.checks import check_generates
from quantdm.pipelines.generate import as_pictures, generate
from quantdm.pipelines.known import known_pipelines
from quantdm.pipelines.loading import load_pipeline, model_name
from quantdm.pipelines.protocol import Protocol, default_protocol, load_protocol
from quantdm.pipelines.sizes import auto_batch
from quantdm.progress import bar

SIGNATURE = ("Software", "quantdm")  # in the PNG: what may be replaced

# ----------------------------------------------------------------------------------------------------------- images


def protocol_of(model: str, pipe: Any, protocol: str | None) -> Protocol:
    """Return the protocol that was named, else the one that a run or export carries, else the model's shipped one."""
    if protocol is not None:
        return load_protocol(protocol)
    recipe = Path(model) / "recipe.yaml"
    if recipe.is_file():
        from quantdm.activations import calibration
        from quantdm.recipe import load_recipe

        found = load_recipe(recipe)
        if found.calibration is not None and found.model not in known_pipelines():
            return calibration.protocol_of(found.calibration)  # what its search asked for
        return default_protocol(found.model)
    return default_protocol(model_name(pipe))


def generate_grid(
    model: str, out: Path, *, images: int, seed: int, steps: int | None, protocol: str | None, columns: int
) -> Path:
    """Generate images and write them as one PNG."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    check_picture(out)
    pipe = load_pipeline(model, torch_dtype=getattr(torch, fast_dtype()))
    chosen = protocol_of(model, pipe, protocol)
    check_generates(pipe, chosen)
    draw = Draw(seed, images, steps or chosen.steps)
    with bar(images, "generate") as progress:
        pixels = generate(
            pipe,
            chosen,
            draw.seeds,
            steps=draw.steps,
            batch_size=min(50, auto_batch(pipe, chosen)),
            progress=progress.update,
        )
    across = pixels.shape[1] if pixels.ndim == 5 else min(columns, images)  # a video is a row of frames
    grid = image_grid(as_pictures(pixels, chosen), across)
    signed = PngInfo()
    signed.add_text(*SIGNATURE)
    with atomic_path(out) as temporary:
        Image.fromarray(grid.squeeze(-1) if grid.shape[-1] == 1 else grid).save(temporary, format="PNG", pnginfo=signed)
    return out


def check_picture(path: Path) -> None:
    """Check that a grid may be written there: nothing there, or an earlier grid.

    Raises:
        QuantDMError: it cannot be written, or is a file that `generate_grid` did not make.
    """
    from PIL import Image, UnidentifiedImageError

    real = check_output(path)
    if not real.exists():
        return
    key, value = SIGNATURE
    try:
        with Image.open(real) as found:
            ours = found.format == "PNG" and found.info.get(key) == value
    except (OSError, UnidentifiedImageError, ValueError):
        ours = False
    if not ours:
        raise QuantDMError(f"{path}: exists and is no grid of `quantdm generate`; move it away or choose another path")


def image_grid(images: torch.Tensor, columns: int) -> np.ndarray:
    """Lay uint8 images [N, C, H, W] out row by row; return uint8 [rows * H, columns * W, C]."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    canvas = torch.zeros(rows * columns, c, h, w, dtype=torch.uint8)
    canvas[:n] = images
    return canvas.view(rows, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c).numpy()


def evaluate_model(
    model: str, *, reference: str | None, images: int, seeds: tuple[int, ...], steps: int | None, protocol: str | None
) -> dict[str, Any]:
    """Measure a pipeline by name, in the dtype that is fast here."""
    check_draws(images, seeds)
    dtype = getattr(torch, fast_dtype())
    pipe = load_pipeline(model, torch_dtype=dtype)
    full = None if reference is None else load_pipeline(reference, torch_dtype=dtype)
    chosen = protocol_of(model, pipe, protocol)
    return evaluate(pipe, protocol=chosen, reference=full, num_images=images, seeds=seeds, steps=steps)
