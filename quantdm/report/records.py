"""What a run directory holds, read for the report. Only run.json is required: a section names the record it lacks."""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantdm.correction.record import Correction, is_current, load_correction
from quantdm.errors import QuantDMError
from quantdm.files import load_tensors, read_json
from quantdm.hub.size import weight_bytes
from quantdm.recipe import Recipe, load_recipe
from quantdm.runs.explain import leading
from quantdm.runs.labels import weights_of
from quantdm.runs.paths import PATHS_FILE
from quantdm.runs.run import Run, RunSettings
from quantdm.runs.split import load_split
from quantdm.runs.store import TrialStore
from quantdm.runs.trials import cheap_verdict, own_trials
from quantdm.runs.tune import TUNING_FILE, TUNING_VERSION
from quantdm.runs.why import WHY_FILE
from quantdm.schemes import QuantConfig
from quantdm.surrogates import Attribution, SearchSpace

_SEARCH = "quantdm search MODEL --target-bits BITS --protocol FILE --run-dir RUN_DIR"
_RUN = _SEARCH.replace("search", "run")
# Record -> the command that makes it (words in capitals as they were given: a report carries no machine's paths).
MADE_BY = {
    "space.json": _SEARCH,
    "trials": _SEARCH,
    "surrogate.json": "quantdm fit --run-dir RUN_DIR",
    "attribution.json": "quantdm explain --run-dir RUN_DIR",
    "selection.json": _SEARCH,
    "split.json": "quantdm run MODEL --pipeline-size SIZE --run-dir RUN_DIR",
    "recipe.yaml": _SEARCH,
    "why.json": _SEARCH,
    "paths.json": "quantdm explain --run-dir RUN_DIR --paths",
    "tuning.json": "quantdm tune --run-dir RUN_DIR",
    "correction.safetensors": "quantdm correct --run-dir RUN_DIR",
    "summary.json": _RUN,
    "samples.safetensors": _RUN,
}


@dataclass(frozen=True, eq=False)
class Records:
    """The records of one run; None where the stage has not run yet."""

    settings: RunSettings
    space: SearchSpace | None
    trials: tuple[dict[str, Any], ...]
    surrogate: dict[str, Any] | None
    attributions: dict[str, Attribution] | None
    selection: dict[str, Any] | None
    why: dict[str, Any] | None
    paths: dict[str, Any] | None
    recipe: Recipe | None
    labels: dict[str, str | None]  # of the recipe's layers
    tuning: dict[str, Any] | None
    correction: Correction | None
    steps: tuple[dict[str, float], ...]
    summary: dict[str, Any] | None
    samples: dict[str, torch.Tensor]
    cheap: dict[str, Any] | None = None  # what was found of cheap labels
    split: dict[str, Any] | None = None  # of a target for the whole pipeline
    export_bytes: int | None = None  # of the weights of all parts, as the export has them

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The result rows by name."""
        return {row["name"]: row for row in (self.summary or {}).get("rows", [])}

    @cached_property
    def choice(self) -> np.ndarray | None:
        """The recipe as positions on the option axis, in the order of the space's layers."""
        if self.space is None or self.recipe is None:
            return None
        return self.space.choice_of(QuantConfig.from_labels(self.labels))

    @cached_property
    def explanation(self) -> tuple[str, Attribution] | None:
        """The attribution that the recipe was chosen by, else that of the best surrogate, with its name."""
        if not self.attributions:
            return None
        name = leading(self.attributions, self.selection, self.surrogate)
        return name, self.attributions[name]


def read_records(run_dir: str | Path) -> Records:
    """Read every record that a run directory holds.

    Raises:
        QuantDMError: no run there; a record that is damaged, of another version, or of another model than the rest.
    """
    run = Run.open(run_dir)

    def optional(name: str, read: Any) -> Any:
        return read(run.path(name)) if run.path(name).exists() else None

    space = optional("space.json", SearchSpace.load)
    recipe = optional("recipe.yaml", load_recipe)
    attributions = optional("attribution.json", _read_attributions)
    for name, attribution in (attributions or {}).items():
        if space is not None and (attribution.layers, attribution.options) != (space.layer_names, space.labels):
            raise QuantDMError(
                f"{run.path('attribution.json')}: {name} explains other layers or options than space.json holds; "
                "run `quantdm explain` again"
            )
    return Records(
        settings=run.settings,
        space=space,
        trials=tuple(TrialStore(run.path("trials")) if space is None else own_trials(run, space)),
        surrogate=optional("surrogate.json", lambda path: read_json(path, version=1)),
        attributions=attributions,
        selection=optional("selection.json", lambda path: read_json(path, version=1)),
        why=optional(WHY_FILE, lambda path: read_json(path, version=1)),
        paths=optional(PATHS_FILE, lambda path: read_json(path, version=1)),
        recipe=recipe,
        labels={} if space is None or recipe is None else weights_of(run, recipe, space.layers),
        tuning=optional(TUNING_FILE, lambda path: read_json(path, version=TUNING_VERSION)),
        correction=optional("correction.safetensors", lambda path: load_correction(path) if is_current(path) else None),
        steps=tuple((optional("correction_steps.json", partial(read_json, version=2)) or {}).get("steps", ())),
        summary=optional("summary.json", lambda path: read_json(path, version=1)),
        samples=optional("samples.safetensors", _read_samples) or {},
        cheap=cheap_verdict(run),
        split=load_split(run.folder, run.settings),
        export_bytes=weight_bytes(run.path("export")) or None,
    )


def _read_attributions(path: Path) -> dict[str, Attribution]:
    return {name: Attribution.from_dict(a) for name, a in read_json(path, version=1)["attributions"].items()}


def _read_samples(path: Path) -> dict[str, torch.Tensor]:
    samples = load_tensors(path)[0]
    for name, images in samples.items():
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise QuantDMError(
                f"{path}: {name} is {images.dtype} {tuple(images.shape)}, "
                "expected uint8 [N, 3, H, W]; delete the file and run the last stage again"
            )
    return samples
