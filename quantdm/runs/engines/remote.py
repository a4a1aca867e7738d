"""A worker on a node of a cluster: one evaluator over files that came by their content."""

import platform
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quantdm.errors import QuantDMError
from quantdm.runs.engines.answer import respond
from quantdm.runs.evaluator import Evaluator
from quantdm.runs.run import Run

GIVEN = ("correction", "tuned")  # files that a job names
MADE = "reference"  # what workers make for others
MUST_MATCH = ("quantdm", "torch", "diffusers", "transformers")  # between driver and workers: labels depend on them
Files = dict[str, tuple[str, list[Any]]]  # name -> (hash of the content, [place in the object store])


@dataclass
class Answer:
    """A record as `respond` makes it, and files that the worker made for others."""

    record: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)


class RemoteWorker:
    """A mirror of the run directory on this node, and the evaluator that reads it.

    Args:
        device: where the pipeline is loaded.
        batch_size: images at once at most.
        versions: of the driver, which have to be this worker's.
    """

    def __init__(self, device: str, batch_size: int | Literal["auto"], versions: dict[str, str]) -> None:
        import torch

        torch.set_num_threads(1)
        self._device, self._versions = device, versions
        self._batch_size: int | Literal["auto"] = batch_size
        self._folder = Path(tempfile.mkdtemp(prefix="quantdm-worker-"))
        self._have: dict[str, str] = {}
        self._evaluator: Evaluator | None = None

    def ready(self) -> bool:
        """Say that this worker has a place."""
        return True

    def answer(self, method: str, argument: Any, files: Files) -> Answer:
        """Fetch what is new of the files, call the evaluator, and return its answer."""
        if isinstance(argument, dict):
            given = {kind: name for kind in GIVEN if (name := argument.get(kind)) is not None}
            argument = {**argument, **{kind: str(self._folder / name) for kind, name in given.items()}}
        record = respond(lambda: self._opened(files), method, argument)
        made = {path.name: path for path in (self._folder / MADE).glob("*.safetensors")}
        new = {f"{MADE}/{name}": path for name, path in made.items() if f"{MADE}/{name}" not in self._have}
        self._have |= dict.fromkeys(new, "made here")
        return Answer(record, {name: path.read_bytes() for name, path in new.items()})

    def _opened(self, files: Files) -> Evaluator:
        self._fetch(files)
        if self._evaluator is None:
            self._check_versions()
            run = Run.open(self._folder)
            subject = run.open_subject(device=self._device)
            self._evaluator = Evaluator(run, subject, batch_size=self._batch_size)
        return self._evaluator

    def _check_versions(self) -> None:
        from quantdm.machine import versions

        own, asked = versions(), self._versions
        other = [
            f"{name} {own.get(name)}, not {asked.get(name)}" for name in MUST_MATCH if own.get(name) != asked.get(name)
        ]
        if other:
            raise QuantDMError(
                f"ray: the worker on {platform.node()} has {'; '.join(other)} as the driver; labels would not be "
                "comparable: install the same versions on all nodes"
            )

    def _fetch(self, files: Files) -> None:
        import ray

        for name, (sha, places) in files.items():
            if name in self._have:
                if self._have[name] not in (sha, "made here"):
                    shutil.rmtree(self._folder, ignore_errors=True)
                    raise QuantDMError(f"{name}: changed while the search was running; start it again")
                continue
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(ray.get(places[0]))
            self._have[name] = sha
