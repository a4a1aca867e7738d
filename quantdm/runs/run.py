"""A run directory: the corridor laid out on disk, with a manifest that says what it is a run of."""

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from quantdm.errors import QuantDMError
from quantdm.files import check_output, check_replaceable, read_json, write_json
from quantdm.pipelines.protocol import Protocol
from quantdm.schemes import Scheme

RUN_VERSION = 1


class RunSettings(BaseModel):
    """What determines every number of a run. Two runs of equal settings end in the same recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = RUN_VERSION
    model: str
    fingerprint: str
    options: tuple[str, ...]
    target_bits: float
    trials: int
    seed: int
    protocol: Protocol
    label_images: int
    label_steps: int
    verify_images: int
    noise_images: int
    dtype: Literal["bfloat16", "float32"]

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The options as schemes (the option axis)."""
        return tuple(Scheme.parse(label) for label in self.options)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in which images are generated for labels."""
        return getattr(torch, self.dtype)


class Run:
    """Paths of one run directory and its settings."""

    def __init__(self, folder: str | Path, settings: RunSettings) -> None:
        self.folder = Path(folder)
        self.settings = settings

    def path(self, name: str) -> Path:
        """Return the path of a record, e.g. `path("recipe.yaml")`."""
        return self.folder / name

    @classmethod
    def create(cls, folder: str | Path, settings: RunSettings) -> "Run":
        """Start a run, or go on with one of the same settings.

        Raises:
            QuantDMError: the folder holds a run of other settings, a recipe that was changed by hand, or files that are
                no run; or it cannot be written.
        """
        check_output(folder, folder=True)
        folder = Path(folder)
        manifest = folder / "run.json"
        check_replaceable(folder / "recipe.yaml")
        if os.path.isfile(manifest):
            run = cls.open(folder)
            # The dtype was the first machine's choice; a resumed run keeps it.
            settings = settings.model_copy(update={"dtype": run.settings.dtype})
            differing = [
                f"{key} is {_short(old)}, asked for {_short(new)}"
                for (key, old), new in zip(
                    run.settings.model_dump(mode="json").items(), settings.model_dump(mode="json").values(), strict=True
                )
                if old != new
            ]
            if differing:
                raise QuantDMError(
                    f"run directory {folder} belongs to another run: {'; '.join(differing[:3])}. "
                    "Choose another --run-dir, or delete this one"
                )
            return run
        if folder.is_file() or (folder.is_dir() and any(p for p in folder.iterdir() if not p.name.startswith("."))):
            raise QuantDMError(f"run directory {folder} is not empty and holds no run.json; choose another --run-dir")
        write_json(manifest, settings.model_dump(mode="json"))
        return cls(folder, settings)

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """Open an existing run.

        Raises:
            QuantDMError: no run there, or one of another version.
        """
        manifest = Path(folder) / "run.json"
        if not os.path.isfile(manifest):
            raise QuantDMError(f"no run in {folder}: {manifest.name} is missing; start one with `quantdm search`")
        try:
            return cls(folder, RunSettings.model_validate(read_json(manifest, version=RUN_VERSION)))
        except ValidationError as error:
            first = error.errors()[0]
            raise QuantDMError(f"{manifest}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
