"""Open pipelines: embedded ones by name, others by directory or hub id."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from packaging.version import Version
from transformers.utils import logging as transformers_logging

from quantdm.errors import QuantDMError
from quantdm.pipelines.known import EMBEDDED, known_pipelines, pipeline_path
from quantdm.pipelines.stored import check_opened, check_stored, read_object, stored_variant

# diffusers renamed the argument in 0.42 and warns about the old name
DTYPE_ARGUMENT = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"


def load_pipeline(
    name_or_path: str | Path,
    *,
    torch_dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    device: str | torch.device = "cpu",
    variant: str | None = None,
) -> DiffusionPipeline:
    """Load a diffusers pipeline: an embedded one by name, any other by directory or hub id.

    Args:
        name_or_path: e.g. "digits-dit", "digits-flow", "exports/small", "PixArt-alpha/PixArt-XL-2-512x512".
        torch_dtype: the dtype of the unquantized tensors and of the computation (None: float32), or one per component
            ("default" for all others).
        device: where the pipeline is put.
        variant: of the weights, as `save_pretrained(variant=...)` names it (None: the ordinary files, or the only
            variant in a directory that has no others).

    Raises:
        QuantDMError: unknown name (the known ones are listed), several variants and no ordinary files, the checkpoint
            cannot be opened, or a component's config and weights do not agree on what quantdm quantized.
    """
    path = pipeline_path(name_or_path)
    folder = fetch_pipeline(path, variant)
    try:
        variant = variant or stored_variant(folder)
        packed = check_stored(folder, variant)
        pipe = open_files(path, variant, torch_dtype or torch.float32)
        check_opened(pipe, packed)
    except QuantDMError:
        raise
    except Exception as error:  # diffusers raises whatever its readers raise: OSError, SafetensorError, ValueError, ...
        raise unopened(str(name_or_path), error) from error
    # from_pretrained leaves it on the CPU; a needless move to it would warn about float16
    return pipe if torch.device(device).type == "cpu" else pipe.to(device)


def fetch_pipeline(path: str, variant: str | None = None) -> Path:
    """Return the folder of a pipeline (see `pipeline_path`); a hub id is downloaded, unless it is in the cache.

    Raises:
        QuantDMError: it cannot be downloaded.
    """
    try:
        with _no_loading_bars():
            return Path(path if os.path.isdir(path) else DiffusionPipeline.download(path, variant=variant))
    except Exception as error:  # the hub client raises whatever its network raises
        raise unopened(path, error) from error


def open_files(
    path: str | Path,
    variant: str | None,
    torch_dtype: torch.dtype | Mapping[str, torch.dtype],
    components: Mapping[str, Any] | None = None,
) -> DiffusionPipeline:
    """Open a pipeline with diffusers, quietly; `components` are taken as they are given instead of being loaded."""
    dtype = dict(torch_dtype) if isinstance(torch_dtype, Mapping) else torch_dtype
    index = Path(path) / "model_index.json"
    # a part that was None when the pipeline was saved: diffusers wants to be told so again
    absent = [k for k, v in (read_object(index) if index.is_file() else {}).items() if v == [None, None]]
    given = {**dict.fromkeys(absent), **(components or {})}
    with _no_loading_bars():
        pipe = DiffusionPipeline.from_pretrained(path, variant=variant, **{DTYPE_ARGUMENT: dtype}, **given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unopened(name: str, error: Exception) -> QuantDMError:
    """Return the error that says in one line why a pipeline cannot be opened."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return QuantDMError(
        f"pipeline {name!r} cannot be opened: {first} (embedded pipelines: {', '.join(known_pipelines())})"
    )


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Hide the bars of diffusers and transformers over components: they flash by in a second and break ours."""
    shown = [module for module in (diffusers_logging, transformers_logging) if module.is_progress_bar_enabled()]
    for module in shown:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in shown:
            module.enable_progress_bar()


# ------------------------------------------------------------------------------------------------- model and target


def model_name(pipe: DiffusionPipeline) -> str:
    """Return the name or path a pipeline was loaded from ("" for one that was built in memory)."""
    source = str(getattr(pipe, "name_or_path", "") or "")
    for name in known_pipelines():
        if source and Path(source) == EMBEDDED / name:
            return name
    return source
