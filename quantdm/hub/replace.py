"""Where an export may be written: what proves that a folder is an earlier export and nothing else."""

import os
import re
from pathlib import Path

from quantdm.correction.record import is_correction
from quantdm.errors import QuantDMError
from quantdm.files import check_output, is_sealed
from quantdm.pipelines.known import pipeline_path
from quantdm.pipelines.source import local_path
from quantdm.pipelines.stored import METHOD, read_object
from quantdm.recipe import load_recipe

CARD, CONFIG, CORRECTION_FILE = "README.md", "config.json", "correction.safetensors"
INDEX, RECIPE_FILE = "model_index.json", "recipe.yaml"

# What `save_pretrained` writes into the folders of a pipeline's parts.
_OF_A_PART = re.compile(
    r"(diffusion_pytorch_model|model)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    r"|(config|scheduler_config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|(preprocessor|processor|image_processor|video_preprocessor)(_config)?)\.json"
    r"|(merges|vocab)\.txt|(spiece|tokenizer|sentencepiece\.bpe)\.model|chat_template\.jinja"
)


def check_export_path(folder: str | Path, model: str | Path, *, apart_from: str | Path | None = None) -> Path:
    """Check that an export may be written to a folder, before anything is computed; return it behind all links.

    Args:
        folder: where the export shall be: not there, empty, or provably an earlier export of quantdm.
        model: the full-precision pipeline; its folder must lie apart.
        apart_from: a run directory that must not be replaced or hold the export in place of its records.

    Raises:
        QuantDMError: it cannot be written, holds something else, or overlaps with the model or the run.
    """
    real = check_output(folder, folder=True)
    check_output(real.parent, folder=True)
    source = local_path(model)
    if os.path.exists(source):
        source = source.resolve()
        if real == source or source in real.parents or real in source.parents:
            raise QuantDMError(
                f"export: {folder} overlaps with the model's own folder {source}; choose another directory"
            )
    else:
        pipeline_path(model)
    if apart_from is not None:
        run = Path(apart_from).resolve()
        if real == run or real in run.parents:
            raise QuantDMError(f"export: {folder} holds the run {apart_from}; choose another directory")
    if real.is_dir() and any(real.iterdir()):
        reason = why_no_export(real)
        if reason is not None:
            raise QuantDMError(
                f"export: {folder} exists and is no export of quantdm: {reason}; choose another directory"
            )
    return real


def why_no_export(folder: Path) -> str | None:
    """Return what keeps a folder from being provably an export of quantdm and nothing else; None if it is one."""
    is_lone = not (folder / INDEX).is_file() and _is_quantized(folder / CONFIG)  # a denoiser without a pipeline
    missing = [name for name in (CONFIG if is_lone else INDEX, RECIPE_FILE) if not (folder / name).is_file()]
    if missing:
        return f"it has no {missing[0]}"
    try:
        index = {} if is_lone else read_object(folder / INDEX)
        recipe = load_recipe(folder / RECIPE_FILE)
        parts = {name for name, entry in index.items() if isinstance(entry, list)}
        quantized = is_lone or any(_is_quantized(folder / name / CONFIG) for name in parts)
    except QuantDMError as error:
        return str(error)
    if not quantized:
        return "no part of it is quantized by quantdm"
    if not is_sealed(folder / RECIPE_FILE) and (folder / RECIPE_FILE).read_text(encoding="utf-8") != recipe.to_yaml():
        return f"its {RECIPE_FILE} was written by hand"
    own = {"."} if is_lone else parts
    foreign = next((path for path in sorted(folder.rglob("*")) if not _is_ours(path, folder, own)), None)
    return None if foreign is None else f"it holds {foreign.relative_to(folder)}, which no export writes"


def _is_quantized(config: Path) -> bool:
    try:
        settings = read_object(config).get("quantization_config") if config.is_file() else None
    except QuantDMError:
        return False
    return isinstance(settings, dict) and settings.get("quant_method") == METHOD


def _is_ours(path: Path, folder: Path, parts: set[str]) -> bool:
    """Tell whether an export writes such a file or folder."""
    where = path.relative_to(folder).parts
    if path.is_symlink() or len(where) > 2:
        return False
    if len(where) == 2:
        return where[0] in parts and path.is_file() and _OF_A_PART.fullmatch(path.name) is not None
    if path.is_dir():
        return path.name in parts
    if path.name == CARD:
        return is_sealed(path)
    if parts == {"."} and path.name != RECIPE_FILE:
        return _OF_A_PART.fullmatch(path.name) is not None
    return path.name in (INDEX, RECIPE_FILE) or (path.name == CORRECTION_FILE and is_correction(path))
