"""Write a quantized pipeline as a directory that plain diffusers opens."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantdm.correction import load_correction
from quantdm.files import YAML_COMMENT, digest, read_json, replace_folder, tensors_digest, write_json, write_text
from quantdm.hub.apply import apply_recipe
from quantdm.hub.quantize import Bank
from quantdm.hub.replace import CORRECTION_FILE, RECIPE_FILE, check_export_path
from quantdm.hub.targets import joint_labels
from quantdm.pipelines.loading import DiffusionPipeline, load_pipeline
from quantdm.recipe import Recipe, weights_digest


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
        folder: where it is written; what is provably an earlier export is replaced, anything else is refused.
        bank: takes packed weights from here instead of quantizing again.
        correction: a file of `Correction.save` that travels along; it was fitted for this recipe and its activations.
        example_inputs: as for `apply_recipe`.

    Raises:
        QuantDMError: the recipe is for another model, the correction for another recipe, or the folder cannot be
            written, holds something else or overlaps with the model's.
    """
    place = check_export_path(folder, model)
    pipe = load_pipeline(model)
    fitted = None
    if correction is not None:
        fitted = load_correction(correction)
        fitted.check_belongs(joint_labels(pipe, recipe, example_inputs), recipe.activations)
    recipe = recipe.model_copy(update={"correction": None if fitted is None else CORRECTION_FILE})
    pipe = load_pipeline(model, torch_dtype=lossless_dtype(pipe))
    apply_recipe(pipe, recipe, bank=bank, example_inputs=example_inputs)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.name[:200]}.", dir=place.parent) as temporary:
        made = Path(temporary) / place.name
        pipe.save_pretrained(made)
        open_in_float32(made, pipe)
        write_text(made / RECIPE_FILE, recipe.to_yaml(), YAML_COMMENT)
        if fitted is not None:
            fitted.save(made / CORRECTION_FILE)
        replace_folder(made, place)
    return Path(folder)


def configuration_digest(
    labels: Mapping[str, str | None],
    activations: Mapping[str, Any] | None,
    correction: str | Path | None,
    tuned: str | Path | None = None,
) -> str:
    """Return the hash of what determines an export's images: schemes, activations, correction and tuning (files)."""
    spec = None if activations is None else dict(activations)
    parts = [weights_digest(labels), spec, None if correction is None else tensors_digest(correction)]
    return digest(*parts, *([] if tuned is None else [tensors_digest(tuned)]))


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
