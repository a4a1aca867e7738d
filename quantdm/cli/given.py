"""What is typed, checked before anything heavy is imported: a typo is answered at once.

`*_given` are the callbacks of arguments that several sub-commands share. Each raises what its check raises.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from quantdm.pipelines.known import pipeline_path
from quantdm.pipelines.protocol import load_protocol
from quantdm.recipe import load_recipe
from quantdm.schemes import Scheme, parse_option


def schemes_of(labels: str | None) -> list[Scheme] | None:
    """Read `--options`, if it is given."""
    return None if labels is None else [parse_option(label.strip()) for label in labels.split(",")]


def checked(check: Callable[[Any], object]) -> Callable[[Any], Any]:
    """Return a callback that checks what was typed, if anything was, and returns it as it is."""

    def callback(given: Any) -> Any:
        if given is not None:
            check(given)
        return given

    return callback


def _check_source(name: str) -> None:
    """Check a pipeline, a lone denoiser or a file."""
    if not os.path.exists(os.path.expanduser(name)):
        pipeline_path(name)


def _check_target(name: str) -> None:
    """Check the same, or a recipe file."""
    if name.endswith((".yaml", ".yml")):
        load_recipe(name)
    else:
        _check_source(name)


def _check_runs(folders: Iterable[Path]) -> None:
    from quantdm.runs.manifest import read_manifest

    for folder in folders:
        read_manifest(folder)


pipeline_given, source_given, target_given = checked(pipeline_path), checked(_check_source), checked(_check_target)
options_given, protocol_given, recipe_given = checked(schemes_of), checked(load_protocol), checked(load_recipe)
run_given, runs_given = checked(lambda folder: _check_runs([folder])), checked(_check_runs)
