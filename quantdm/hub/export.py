"""Write a quantized pipeline as a directory that plain diffusers opens."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantdm.errors import QuantDMError
from quantdm.files import read_json, write_json
from quantdm.hub.apply import apply_recipe
from quantdm.hub.quantize import Bank
from quantdm.pipelines.loading import DiffusionPipeline, load_pipeline
from quantdm.recipe import Recipe

CORRECTION_FILE, RECIPE_FILE = "correction.safetensors", "recipe.yaml"


def export_pipeline(
    model: str | Path,
    recipe: Recipe,
    folder: str | Path,
    *,
    bank: Bank | None = None,
    correction: str | Path | None = None,
    example_inputs: Mapping[str, Any] | None = None,
) -> Path:
    """Quantize a pipeline by a recipe and save it; nothing half-written is left behind.

    What stays unquantized is stored in the narrowest dtype that holds it exactly.

    Args:
        model: name or path of the full-precision pipeline.
        recipe: one scheme per layer of its denoiser.
        folder: where it is written; an earlier export there is replaced, anything else is refused.
        bank: takes packed weights from here instead of quantizing again.
        correction: a file of `Correction.save` that travels along.
        example_inputs: as for `apply_recipe`.

    Raises:
        QuantDMError: the recipe is for another model, or the folder holds something else.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / RECIPE_FILE).is_file() and not _is_empty(folder):
        raise QuantDMError(f"export: {folder} exists and is no export of quantdm; choose another directory")
    dtype = lossless_dtype(load_pipeline(model))
    pipe = load_pipeline(model, torch_dtype=dtype)
    apply_recipe(pipe, recipe, bank=bank, example_inputs=example_inputs)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name
        pipe.save_pretrained(made)
        open_in_float32(made, pipe)
        recipe.save(made / RECIPE_FILE)
        if correction is not None:
            shutil.copyfile(correction, made / CORRECTION_FILE)
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return folder


def lossless_dtype(pipe: DiffusionPipeline) -> torch.dtype:
    """Return the narrowest dtype that holds every floating-point tensor of a pipeline exactly."""
    modules = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    tensors = [t for m in modules for t in m.state_dict().values() if t.is_floating_point()]
    for dtype in (torch.float16, torch.bfloat16):
        if all(torch.equal(t.to(dtype).to(t.dtype), t) for t in tensors):
            return dtype
    return torch.float32


def open_in_float32(folder: Path, pipe: DiffusionPipeline) -> None:
    """Let plain `from_pretrained` open text encoders in float32, as it opens all other parts.

    transformers takes the stored dtype by default and diffusers float32: a pipeline stored in 16 bits would not run.
    """
    for name, part in pipe.components.items():
        path = folder / name / "config.json"
        if isinstance(part, nn.Module) and path.is_file():
            config = read_json(path)
            if "dtype" in config:
                write_json(path, config | {"dtype": "float32"})


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
