"""Write a quantized pipeline as a directory that plain diffusers opens, layer by layer from its files."""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantdm.correction import load_correction
from quantdm.files import YAML_COMMENT, digest, read_json, replace_folder, tensors_digest, write_json, write_text
from quantdm.hub.apply import mark_quantized_, register
from quantdm.hub.calibrated import calibrated_layers, check_calibration, packed_bank
from quantdm.hub.journal import Workplace
from quantdm.hub.plan import Plan, check_weights, plan_recipe, read_if_path
from quantdm.hub.quantize import Bank, set_packed_
from quantdm.hub.replace import CORRECTION_FILE, RECIPE_FILE, check_export_path
from quantdm.hub.streaming import Work, narrowest, prepare, write_part
from quantdm.hub.targets import joint_labels
from quantdm.machine import versions
from quantdm.pipelines.casting import cast_
from quantdm.pipelines.loading import DiffusionPipeline, load_pipeline
from quantdm.pipelines.source import Source, StoredPart, open_source
from quantdm.recipe import ActivationSpec, CalibrationSpec, Recipe, weights_digest


def export_pipeline(
    model: str | Path,
    recipe: Recipe | str | Path,
    folder: str | Path,
    *,
    bank: Bank | None = None,
    correction: str | Path | None = None,
    calibration: CalibrationSpec | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    variant: str | None = None,
    config: str | Path | None = None,
    same_architecture: bool = False,
) -> Path:
    """Quantize a pipeline by a recipe and save it, layer by layer: its weights are never in memory all at once.

    What stays unquantized is stored as it was: bit by bit, float32 in 16 bits where these hold all of a quantized
    network exactly. Nothing half-written is left behind; only a process that is killed or interrupted leaves its
    finished layers beside the folder, and the same call goes on with them.

    Args:
        model: name or path of the full-precision pipeline: also the folder of a denoiser, or a safetensors file of one.
        recipe: one scheme per layer of its denoiser, or its file.
        folder: where it is written; what is provably an earlier export is replaced, anything else is refused.
        bank: takes packed weights from here instead of quantizing again.
        correction: a file of `Correction.save` that travels along; it was fitted for this recipe and its activations.
        calibration: as for `apply_recipe`; the whole pipeline is opened then, in float32, and starts anew if killed.
        example_inputs: as for `apply_recipe`.
        variant: of the weights, e.g. "fp16" (see `load_pipeline`).
        config: of the denoiser in a single file, see `open_source`.
        same_architecture: as for `apply_recipe`.

    Raises:
        QuantDMError: the recipe is for another model, the correction for another recipe, or the folder cannot be
            written, holds something else or overlaps with the model's.
    """
    register()
    recipe = read_if_path(recipe)
    place = check_export_path(folder, model)
    source = open_source(model, variant=variant, config=config)
    if not same_architecture:
        check_weights(source.pipe, recipe, {name: part.tensors for name, part in source.parts.items()})
    fitted = None
    if correction is not None:
        fitted = load_correction(correction)
        fitted.check_belongs(joint_labels(source.pipe, recipe, example_inputs), recipe.activations)
    own = {"correction": None if fitted is None else CORRECTION_FILE, "calibration": calibration or recipe.calibration}
    recipe = recipe.model_copy(update=own)
    works = _prepare(source, _plans(source, model, recipe, bank, example_inputs, variant))
    workplace = Workplace(place, _key(source, works))
    try:
        _write(source, works, workplace)
        write_text(workplace.made / RECIPE_FILE, recipe.to_yaml(), YAML_COMMENT)
        if fitted is not None:
            fitted.save(workplace.made / CORRECTION_FILE)
        replace_folder(workplace.made, place)
    except Exception:  # Ctrl-C is none: what is finished is kept then
        workplace.remove()
        raise
    finally:
        workplace.close()
    workplace.remove()
    return Path(folder)


def _plans(
    source: Source,
    model: str | Path,
    recipe: Recipe,
    bank: Bank | None,
    example_inputs: Mapping[str, Any] | None,
    variant: str | None,
) -> list[Plan]:
    """Return what is asked of every model; for calibrated schemes that no bank has, the pipeline is opened and run."""
    plans = plan_recipe(source.pipe, recipe, bank=bank, example_inputs=example_inputs)
    if not any(map(calibrated_layers, plans)):
        return plans
    check_calibration(source.pipe, plans, recipe.calibration)
    bank = packed_bank(load_pipeline(model, variant=variant), recipe, example_inputs)
    return plan_recipe(source.pipe, recipe, bank=bank, example_inputs=example_inputs)


def _key(source: Source, works: Mapping[str, Work]) -> str:
    """Return the hash of what is exported: two exports with equal ones may share their finished layers."""
    files = {name: [file.name for file in part.files] for name, part in source.parts.items()}
    return digest(versions(), files, {part: work.key() for part, work in works.items()})


def _prepare(source: Source, plans: list[Plan]) -> dict[str, Work]:
    """Get every model that is quantized ready: those that had to be loaded are packed now, skeletons on the way."""
    names = {id(model): name for name, model in source.models.items()}
    works = {}
    for plan in plans:
        name = names[id(plan.model)]
        if name in source.parts:
            works[name] = prepare(plan, source.parts[name])
            continue
        warnings.warn(
            f"{name}: is opened whole, as it has no safetensors files with the names of a {type(plan.model).__name__}",
            stacklevel=3,
        )
        cast_(plan.model, lossless_dtype(plan.model))
        set_packed_(plan.model, plan.pack(), plan.bank)
        mark_quantized_(plan.model, plan.config)
    return works


def _write(source: Source, works: Mapping[str, Work], workplace: Workplace) -> None:
    made = workplace.made
    made.mkdir(exist_ok=True)
    for name, work in works.items():
        write_part(work, made / name, name, workplace)
    if isinstance(source.pipe, nn.Module):
        return
    for name, part in source.pipe.components.items():
        if name in works or part is None:
            continue
        if name in source.parts:
            _copy_part(source.parts[name], made / name)
        else:
            part.save_pretrained(made / name)
    source.pipe.save_config(made)
    open_in_float32(made, source.pipe)


def _copy_part(part: StoredPart, folder: Path) -> None:
    """Copy the files of a network that stays as it is, under the ordinary names."""
    assert part.folder is not None
    folder.mkdir(exist_ok=True)
    stem = part.files[0].name.split(".")[0].split("-")[0]
    indices = part.folder.glob(f"{stem}.safetensors.index*.json") if len(part.files) > 1 else ()
    for file in (*part.files, *indices, part.folder / "config.json", part.folder / "generation_config.json"):
        if not file.is_file():
            continue
        target = folder / _without_variant(file.name, part.variant)
        if ".index." in file.name:
            index = read_json(file)
            places = {key: _without_variant(place, part.variant) for key, place in index["weight_map"].items()}
            if {*index["weight_map"].values()} == {path.name for path in part.files}:
                write_json(target, index | {"weight_map": places})
        else:
            shutil.copyfile(file, target)


def _without_variant(name: str, variant: str | None) -> str:
    return name if variant is None else name.replace(f".{variant}", "", 1)


def configuration_digest(
    labels: Mapping[str, str | None],
    activations: Mapping[str, Any] | None,
    correction: str | Path | None,
    tuning: str | None = None,
) -> str:
    """Return the hash of what determines an export's images: schemes, activations, correction (its file), tuning.

    `tuning` is the digest of the tuned weights, as a recipe's provenance has it.
    """
    # as it is read, so that older files and newer ones that say the same have the same hash
    spec = None if activations is None else ActivationSpec.model_validate(activations).model_dump(mode="json")
    parts = [weights_digest(labels), spec, None if correction is None else tensors_digest(correction)]
    return digest(*parts, *([] if tuning is None else [tuning]))


def lossless_dtype(part: nn.Module) -> torch.dtype:
    """Return the narrowest dtype that holds every floating-point tensor of a network exactly."""
    floats = [tensor for tensor in part.state_dict().values() if tensor.is_floating_point()]
    return narrowest((lambda t=tensor: t) for tensor in floats) or torch.float32


def open_in_float32(folder: Path, pipe: DiffusionPipeline) -> None:
    """Let plain `from_pretrained` open text encoders in float32, as it opens all other parts.

    transformers takes the stored dtype by default and diffusers float32: a pipeline stored in 16 bits would not run.
    """
    for name, part in pipe.components.items():
        path = folder / name / "config.json"
        if isinstance(part, nn.Module) and path.is_file():
            config = read_json(path)
            if "dtype" in config or "torch_dtype" in config:
                config.pop("torch_dtype", None)
                write_json(path, config | {"dtype": "float32"})
