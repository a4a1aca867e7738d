"""What images are asked for when a denoiser is measured: conditions, steps, guidance, features. Data, not code."""

import os
from importlib import resources
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from quantdm.errors import QuantDMError


class Protocol(BaseModel):
    """How images are generated for measuring.

    Image i shows `values[i % len(values)]`. `features` names the extractor of the Frechet distance; `real` names real
    images of the same kind, if there are any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    argument: Literal["prompt", "class_labels"]
    values: tuple[str, ...] | tuple[int, ...]
    steps: int
    guidance_scale: float
    resolution: int | None = None
    features: str
    real: Literal["digits"] | None = None


def _directories() -> list[Path]:
    """Where protocols lie: inside an installed package, or beside it in a checkout."""
    package = Path(str(resources.files("quantdm")))
    return [d for d in (package / "calib_data", package.parent / "calib_data") if d.is_dir()]


def known_protocols() -> list[str]:
    """Return the names of the shipped protocols."""
    return sorted({p.stem for d in _directories() for p in d.glob("*.yaml")})


def load_protocol(name_or_path: str | Path) -> Protocol:
    """Read a protocol: a shipped one by name, or any YAML file.

    Raises:
        QuantDMError: no such file, not YAML, unknown keys or wrong types.
    """
    candidates = [d / f"{name_or_path}.yaml" for d in _directories()] + [Path(name_or_path)]
    path = next((p for p in candidates if os.path.isfile(p)), None)
    if path is None:
        raise QuantDMError(
            f"protocol: got {str(name_or_path)!r}, expected a YAML file or one of {', '.join(known_protocols())}"
        )
    try:
        return Protocol.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise QuantDMError(f"protocol {path}: not YAML ({' '.join(str(error).split())})") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        raise QuantDMError(f"protocol {path}: {problems}") from None


def default_protocol(model: str) -> Protocol:
    """Return the shipped protocol of a model.

    Raises:
        QuantDMError: there is none; says how to write one.
    """
    if model in known_protocols():
        return load_protocol(model)
    raise QuantDMError(
        f"no protocol for model {model or '(built in memory)'!r}; pass protocol=load_protocol('my.yaml') with the "
        f"prompts or class labels to measure on (examples: {', '.join(known_protocols())} in calib_data)"
    )
