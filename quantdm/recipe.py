"""The recipe: the chosen config with activations, correction and where it comes from."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from quantdm.errors import QuantDMError
from quantdm.files import write_text
from quantdm.schemes import QuantConfig, Scheme

RECIPE_VERSION = 1


class ActivationSpec(BaseModel):
    """Dynamic activation quantization: asymmetric min-max per token, no calibration.

    `bits` holds everywhere except in layers whose name or operation type matches a glob of `keep_8bit` (8 bits there).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Literal[6, 8]
    keep_8bit: tuple[str, ...] = ()


class Provenance(BaseModel):
    """Where a recipe comes from: measured here, or taken from a published insight."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = "written by hand, not measured"
    quantdm: str | None = None
    seed: int | None = None
    trials: int | None = None
    target: str | None = None
    measured: dict[str, float] = Field(default_factory=dict)


class Recipe(BaseModel):
    """A checked, serialisable choice of one scheme per layer for one model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = RECIPE_VERSION
    model: str
    layers: dict[str, str | None]
    activations: ActivationSpec | None = None
    correction: str | None = Field(default=None, description="file name of the correction that belongs to it")
    avg_bits: float | None = None
    provenance: Provenance = Provenance()

    @field_validator("layers")
    @classmethod
    def _check_labels(cls, layers: dict[str, str | None]) -> dict[str, str | None]:
        for label in layers.values():
            if label is not None:
                Scheme.parse(label)
        return layers

    @property
    def config(self) -> QuantConfig:
        """The recipe's weights: layer name -> Scheme or None."""
        return QuantConfig.from_labels(self.layers)

    def save(self, path: str | Path) -> Path:
        """Write the recipe as YAML, atomically."""
        path = Path(path)
        write_text(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=110))
        return path


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe written by `Recipe.save`.

    Raises:
        QuantDMError: no such file, not YAML, unknown keys, wrong types or another version; the message names the key.
    """
    path = Path(path)
    try:
        record: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise QuantDMError(f"recipe: no file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise QuantDMError(f"recipe {path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(record, dict):
        raise QuantDMError(f"recipe {path}: got a {type(record).__name__}, expected keys such as 'model' and 'layers'")
    try:
        return Recipe.model_validate(record)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        raise QuantDMError(f"recipe {path}: {problems}") from None


def check_layers(config: QuantConfig, layer_names: Iterable[str], *, what: str = "recipe") -> None:
    """Check that a config covers exactly the layers of a denoiser.

    Raises:
        QuantDMError: names the first layers that differ.
    """
    known = list(layer_names)
    missing = [name for name in known if name not in config]
    unknown = [name for name in config if name not in set(known)]
    if missing or unknown:
        parts = []
        if unknown:
            parts.append(f"{len(unknown)} layers that the model has not, first {', '.join(unknown[:3])}")
        if missing:
            parts.append(f"no scheme for {len(missing)} layers of the model, first {', '.join(missing[:3])}")
        raise QuantDMError(f"{what} is for another model: it has " + " and ".join(parts))
