"""A run directory: the corridor laid out on disk, with a manifest that says what it is a run of."""

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from quantdm.denoisers.given_inputs import parse_inputs
from quantdm.errors import QuantDMError, reason_of
from quantdm.files import check_output, write_json
from quantdm.pipelines.inputs import PATH_KEYS
from quantdm.pipelines.protocol import Protocol, known_protocols, load_protocol
from quantdm.pipelines.seen import Seen, differences
from quantdm.pipelines.subject import Subject, reopen
from quantdm.recipe import CalibrationSpec
from quantdm.runs.claims import CLAIMS, Claims
from quantdm.runs.manifest import MANIFEST, RUN_VERSION, read_manifest
from quantdm.schemes import COMPARED, ORIGINAL, TABLE_SCHEME, Scheme, parse_option

CALIBRATION_SEED = 900  # base seed of the trajectories that calibrate: outside those of every draw
ABANDONED = 3600.0  # seconds without a write after which nobody is writing a temporary file any more
MIN_TRIALS = 30  # the fewest that a search is asked for: surrogates learn nothing from fewer
SNAPSHOT = "subject"
# Settings that may change while a run goes on: what was measured under others stays true, and counts where it applies.
GROWS = (
    "target_bits", "target_pipeline_bytes", "trials", "options", "label_images", "verify_images", "verify_draws",
    "verify_steps", "fidelity",
)  # fmt: skip


class RunSettings(BaseModel):
    """What determines every number of a run. Two runs of equal settings end in the same recipe.

    `model` is what the pipeline is called, `location` where it can be opened again ("": a snapshot in the run
    directory), `seen` what it was when the run started.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[2] = RUN_VERSION
    model: str
    location: str
    seen: Seen
    options: tuple[str, ...]
    target_bits: float
    trials: int
    seed: int
    protocol: Protocol
    label_images: int
    label_steps: int
    verify_images: int
    verify_draws: int = 2  # what runs before 0.3 had
    verify_steps: int | None = None  # None: those of the protocol
    noise_images: int
    noise_steps: int | None = None  # of the trajectories of one-layer errors; None: those of the trials
    noise_signs: int | None = None  # that one-layer errors are averages over; None: each is measured, as before 0.3
    calibration_images: int = 16  # what runs before 0.3 had, whose manifests do not say
    sweeps: int = 0
    calibration_steps: int | None = None  # None: those of the trials, as runs before 0.3 had
    dtype: Literal["bfloat16", "float16", "float32"]
    fidelity: Literal["full", "auto"] = "full"  # auto: most trials get a cheap label, if it ranks as the full one
    embeddings: str | None = None  # scheme of embedding tables in all that is measured; None: they stay as they are
    learned: str | None = None  # digest of what other runs taught (learned.json); None: nothing
    target_pipeline_bytes: int | None = None  # the target, if it is of all parts: `target_bits` is what that leaves

    @model_serializer(mode="wrap")
    def _as_older_runs(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what runs before 0.4 did not have, so that what they have recorded stays theirs."""
        absent: dict[str, Any] = {
            "embeddings": None, "verify_draws": 2, "learned": None, "fidelity": "full", "noise_steps": None,
            "target_pipeline_bytes": None, "noise_signs": None, "verify_steps": None,
        }  # fmt: skip
        return {key: value for key, value in dump(self).items() if key not in absent or value != absent[key]}

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The options as schemes (the option axis)."""
        return tuple(parse_option(label) for label in self.options)

    @property
    def table_scheme(self) -> Scheme | None:
        """The scheme of embedding tables; None: they stay as they are."""
        return None if self.embeddings is None else Scheme.parse(self.embeddings)

    @property
    def calibration(self) -> CalibrationSpec:
        """What calibrated options are calibrated on; a shipped protocol by its name."""
        own = next((name for name in known_protocols() if load_protocol(name) == self.protocol), None)
        return CalibrationSpec(
            protocol=own or self.protocol.model_dump(mode="json"),
            images=self.calibration_images,
            steps=self.calibration_steps or self.label_steps,
            first_seed=(self.seed * 1000 + CALIBRATION_SEED) * 10**6,
            sweeps=self.sweeps,
        )

    @property
    def steps_of_verification(self) -> int:
        """How many steps candidates are compared on."""
        return self.verify_steps or self.protocol.steps

    @property
    def bank_schemes(self) -> tuple[Scheme, ...]:
        """The options, and the schemes without calibration that every result is compared with."""
        return tuple(scheme for scheme in dict.fromkeys((*self.schemes, *COMPARED)) if scheme != ORIGINAL)

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

    @property
    def location(self) -> str:
        """Where the run's pipeline can be opened: its source, or the snapshot that the run keeps of a changed one."""
        return self.settings.location or str(self.path(SNAPSHOT))

    def open_subject(self, *, device: str | None = None) -> Subject:
        """Open the run's pipeline again and look at it, on a device (None: of the kind on which the run started).

        Raises:
            QuantDMError: it is gone, or no longer what it was when the run started.
        """
        settings = self.settings
        inputs = {part: parse_inputs(record) for part, record in settings.seen.example_inputs.items()}
        return reopen(self.location, settings.model, settings.seen, example_inputs=inputs or None, device=device)

    @classmethod
    def create(cls, folder: str | Path, settings: RunSettings, *, keep_dtype: bool = True) -> "Run":
        """Start a run, or go on with one: of the same settings, or grown (GROWS), or of a pipeline that was moved.

        What processes that were killed left half-written in it is deleted.

        Args:
            keep_dtype: whether a run that goes on keeps the dtype that the first machine chose.

        Raises:
            QuantDMError: the folder holds a run of other settings (they are named) or one that another process works
                on, where it would grow; or files that are no run; or it cannot be written.
        """
        check_output(folder, folder=True)
        folder = Path(folder)
        if os.path.isfile(folder / MANIFEST):
            run = cls.open(folder)
            if keep_dtype:
                settings = settings.model_copy(update={"dtype": run.settings.dtype})
            if settings.embeddings == TABLE_SCHEME.label:  # the default, which runs before 0.4 had not
                settings = settings.model_copy(update={"embeddings": run.settings.embeddings})
            # Sensitivities are not measured anew: before 0.3 both were None.
            own = {name: getattr(run.settings, name) for name in ("noise_signs", "noise_steps")}
            settings = settings.model_copy(update=own)
            differing = _differences(run.settings, settings)
            if differing:
                raise QuantDMError(
                    f"run directory {folder} belongs to another run: {'; '.join(differing[:3])}. "
                    "Choose another --run-dir, or start it as it was"
                )
            Claims(folder, lease=ABANDONED).sweep(folder, "**/.*.tmp")
            return run.grow(settings)
        if folder.is_file() or (folder.is_dir() and any(p for p in folder.iterdir() if not p.name.startswith("."))):
            raise QuantDMError(f"run directory {folder} is not empty and holds no {MANIFEST}; choose another --run-dir")
        write_json(folder / MANIFEST, settings.model_dump(mode="json"))
        return cls(folder, settings)

    def grow(self, settings: RunSettings) -> "Run":
        """Return the run with what may change of its settings, and say so in its manifest.

        Raises:
            QuantDMError: they change, and another process works on the run.
        """
        changed = {key: getattr(settings, key) for key in (*GROWS, "protocol")}
        if settings.location and self.settings.location:  # where the pipeline lies now
            changed["location"] = settings.location
        grown = self.settings.model_copy(update=changed)
        if grown == self.settings:
            return self
        busy = [claim for place in self.folder.glob(f"*/{CLAIMS}") for claim in Claims(place).living()]
        if busy:
            raise QuantDMError(
                f"run directory {self.folder}: process {busy[0].pid} on {busy[0].host} works on it with other "
                "settings; wait until it is done, or choose another --run-dir"
            )
        write_json(self.path(MANIFEST), grown.model_dump(mode="json"))
        return Run(self.folder, grown)

    def settle(self, target_bits: float) -> "Run":
        """Return the run with the size that its split leaves for the denoisers, and say so in its manifest.

        It follows from measurements that all processes share, so each of them may say it while others work.
        """
        settled = self.settings.model_copy(update={"target_bits": target_bits})
        if settled != self.settings:
            write_json(self.path(MANIFEST), settled.model_dump(mode="json"))
        return Run(self.folder, settled)

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """Open an existing run.

        Raises:
            QuantDMError: no run there, or one of another version.
        """
        record = read_manifest(folder)
        try:
            return cls(folder, RunSettings.model_validate(record))
        except ValidationError as error:
            raise QuantDMError(f"{Path(folder) / MANIFEST}: {reason_of(error)}") from None


def _differences(first: RunSettings, second: RunSettings) -> list[str]:
    """Return which settings differ that no run survives; where things lie makes no difference, what they are does."""
    other = differences(first.seen, second.seen)
    apart = {"seen", "location", "protocol", *GROWS, *([] if other else ["model"])}
    old, new = (settings.model_dump(mode="json", exclude=apart) for settings in (first, second))
    keys = dict.fromkeys([*old, *new])
    found = [
        f"{key} is {_short(old.get(key))}, asked for {_short(new.get(key))}"
        for key in keys
        if old.get(key) != new.get(key)
    ]
    before, after = (_placeless(settings.protocol.model_dump(mode="json")) for settings in (first, second))
    found += [
        f"protocol.{key} is {_short(before.get(key))}, asked for {_short(after.get(key))}"
        for key in {**before, **after}
        if key != "metrics" and before.get(key) != after.get(key)  # metrics are computed anew, nothing else is
    ]
    return found + other


def _placeless(data: Any) -> Any:
    """Return a protocol's record without the paths of files whose content it knows by their hash."""
    if isinstance(data, list):
        return [_placeless(item) for item in data]
    if not isinstance(data, dict):
        return data
    known = data.get("sha256") is not None
    return {key: _placeless(item) for key, item in data.items() if not (known and key in PATH_KEYS)}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
