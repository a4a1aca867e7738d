"""What is typed, checked before anything heavy is imported: a typo is answered at once.

Each is the callback of an argument that several sub-commands share; it returns what was typed as it is.
"""

import os
from pathlib import Path

from quantdm.pipelines.known import pipeline_path
from quantdm.pipelines.protocol import load_protocol
from quantdm.recipe import load_recipe
from quantdm.schemes import Scheme, parse_option


def schemes_of(labels: str | None) -> list[Scheme] | None:
    """Read `--options`, if it is given."""
    return None if labels is None else [parse_option(label.strip()) for label in labels.split(",")]


def pipeline_given(name: str) -> str:
    """Check that a pipeline's name is an embedded one, a pipeline on disk, or like a hub id.

    Raises:
        QuantDMError: it is none of them (see `pipeline_path`).
    """
    pipeline_path(name)
    return name


def source_given(name: str) -> str:
    """Check the same of what may be a lone denoiser or a file as well.

    Raises:
        QuantDMError: as above, or nothing is there.
    """
    return name if os.path.exists(os.path.expanduser(name)) else pipeline_given(name)


def target_given(name: str) -> str:
    """Check the same of what may be a recipe file as well.

    Raises:
        QuantDMError: as above, or the recipe cannot be read.
    """
    if name.endswith((".yaml", ".yml")):
        recipe_given(Path(name))
        return name
    return source_given(name)


def options_given(labels: str | None) -> str | None:
    """Check that every scheme of `--options` is one.

    Raises:
        QuantDMError: names the first that is not.
    """
    schemes_of(labels)
    return labels


def protocol_given(name: str | None) -> str | None:
    """Check that a protocol can be read.

    Raises:
        QuantDMError: it cannot (see `load_protocol`).
    """
    if name is not None:
        load_protocol(name)
    return name


def recipe_given(path: Path | None) -> Path | None:
    """Check that a recipe can be read.

    Raises:
        QuantDMError: it cannot (see `load_recipe`).
    """
    if path is not None:
        load_recipe(path)
    return path


def run_given(folder: Path | None) -> Path | None:
    """Check that a folder holds a run.

    Raises:
        QuantDMError: it does not, or one of another version.
    """
    from quantdm.runs.manifest import read_manifest

    if folder is not None:
        read_manifest(folder)
    return folder


def runs_given(folders: list[Path] | None) -> list[Path] | None:
    """Check that each folder holds a run.

    Raises:
        QuantDMError: as above, of the first that does not.
    """
    for folder in folders or ():
        run_given(folder)
    return folders
