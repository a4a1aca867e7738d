"""A worker on a node of a cluster: one evaluator over files that came by their content."""

import hashlib
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quantdm.errors import QuantDMError
from quantdm.machine import versions
from quantdm.metrics.features import open_features
from quantdm.metrics.samples import DIGITS, pictures_in
from quantdm.pipelines.protocol import Protocol
from quantdm.runs.engines.answer import OPEN, respond
from quantdm.runs.engines.mirror import Mirror, Parcel, node_folder
from quantdm.runs.engines.outbox import GIVEN
from quantdm.runs.evaluator import Evaluator
from quantdm.runs.run import Run

MADE = "reference"  # what workers make for others
# Labels depend on these, and what surrogates propose.
MUST_MATCH = ("quantdm", "torch", "diffusers", "transformers", "numpy", "scipy", "xgboost-cpu", "xgboost")


@dataclass
class Answer:
    """A record as `respond` makes it, and files that the worker made for others."""

    record: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)


def facts_of(protocol: Protocol) -> dict[str, str]:
    """Return what the numbers of a run depend on beside its files, here: versions, feature weights, real pictures.

    Raises:
        QuantDMError: the weights of the protocol's features are not here.
    """
    facts = {**versions(MUST_MATCH), "features": open_features(protocol.features).ruler}
    if protocol.real not in (None, DIGITS):
        sha = hashlib.sha256()
        for path in pictures_in(Path(protocol.real)):
            sha.update(path.name.encode() + path.read_bytes())
        facts["real pictures"] = sha.hexdigest()[:16]
    return facts


class RemoteWorker:
    """A mirror of the run directory on this node, and the evaluator that reads it.

    Args:
        device: where the pipeline is loaded.
        batch_size: images at once at most.
        facts: of the driver (`facts_of`), which have to be this worker's.
    """

    def __init__(self, device: str, batch_size: int | Literal["auto"], facts: dict[str, str]) -> None:
        import torch

        torch.set_num_threads(1)
        self._device, self._facts = device, facts
        self._batch_size: int | Literal["auto"] = batch_size
        self._mirror: Mirror | None = None
        self._evaluator: Evaluator | None = None

    def ready(self) -> tuple[str, str]:
        """Say that this worker has a place: on which node, and the name of its folder there."""
        import ray

        return ray.get_runtime_context().get_node_id(), self._mirrored().folder.name

    def load(self, parcel: Parcel) -> Answer:
        """Fetch files and open the pipeline: however long that takes, it is no job that hangs."""
        record = self._fetched(parcel) or respond(self._opened, OPEN, None)
        return Answer(record if "error" not in record else {"error": f"ray, on {platform.node()}: {record['error']}"})

    def answer(self, method: str, argument: Any, parcel: Parcel) -> Answer:
        """Fetch what is new of the files, call the evaluator, and return its answer."""
        if (failed := self._fetched(parcel)) is not None:
            return Answer(failed)
        mirror = self._mirrored()
        if isinstance(argument, dict):
            given = {kind: name for kind in GIVEN if (name := argument.get(kind)) is not None}
            argument = {**argument, **{kind: str(mirror.folder / name) for kind, name in given.items()}}
        record = respond(self._opened, method, argument)
        return Answer(record, {name: path.read_bytes() for name, path in mirror.made(MADE).items()})

    def _mirrored(self) -> Mirror:
        if self._mirror is None:
            self._mirror = Mirror(node_folder())
        return self._mirror

    def _fetched(self, parcel: Parcel) -> dict[str, Any] | None:
        """Fetch what is new; what Ray raises is the engine's to try again elsewhere."""
        import ray

        try:
            self._mirrored().take(parcel, ray.get)
        except QuantDMError as error:
            return {"error": str(error)}
        return None

    def _opened(self) -> Evaluator:
        if self._evaluator is None:
            run = Run.open(self._mirrored().folder)
            self._check_facts(run)
            subject = run.open_subject(device=self._device)
            self._evaluator = Evaluator(run, subject, batch_size=self._batch_size)
        return self._evaluator

    def _check_facts(self, run: Run) -> None:
        own, asked = facts_of(run.settings.protocol), self._facts
        other = [f"{k} {own.get(k)}, not {asked.get(k)}" for k in {**asked, **own} if own.get(k) != asked.get(k)]
        if other:
            raise QuantDMError(
                f"has {'; '.join(other)} as the driver; labels would not be comparable: install the same on all nodes"
            )
