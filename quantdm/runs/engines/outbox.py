"""What the workers of a cluster need of the driver's disk: files by their content, in Ray's object store."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quantdm.errors import QuantDMError
from quantdm.files import atomic_path, digest
from quantdm.runs.engines.call import Call
from quantdm.runs.engines.mirror import Files, Parcel
from quantdm.runs.evaluator import Job
from quantdm.runs.proposals import Proposal
from quantdm.runs.run import MANIFEST, SNAPSHOT, Run

LISTED = (MANIFEST, "bank", SNAPSHOT, "reference")  # of a run directory: what every worker reads
GIVEN = ("correction", "tuned")  # files that a job names
SPACE = "space.json"  # what a proposal is about; it grows with the options while a search goes on


class Outbox:
    """The files of a run directory in the object store.

    Args:
        run: whose files.
        put: puts data into the object store, and returns their place.
    """

    def __init__(self, run: Run, put: Callable[[Any], Any]) -> None:
        self._run, self._put = run, put
        self._places: dict[str, Any] = {}  # hash of a file's content -> where the object store has it
        self._known: dict[Path, tuple[tuple[int, int], str]] = {}  # file -> (time and size, hash)
        self._listed: dict[str, str] = {}
        self._version, self._listing = "", []

    def look(self) -> None:
        """Take in what is new in the run directory, or changed."""
        self._list({path.relative_to(self._run.folder).as_posix(): self._send(path) for path in self._paths()})

    def receive(self, files: Mapping[str, bytes]) -> None:
        """Keep what a worker made for others: full-precision samples."""
        new = {}
        for name, data in files.items():
            if not self._run.path(name).is_file():
                with atomic_path(self._run.path(name)) as path:
                    path.write_bytes(data)
            new[name] = self._send(self._run.path(name))
        self._list({**self._listed, **new})

    def parcel(self, call: Call | None = None) -> tuple[Any, Parcel]:
        """Return the record of a call's argument as a worker reads it, and what it has to have for it."""
        given: dict[str, str] = {}
        record: Any = None if call is None else call.record
        if call is not None and isinstance(call.argument, Job):
            for kind in GIVEN:
                if record[kind] is not None:
                    path = Path(record[kind])
                    sha = self._send(path)
                    record[kind] = f"given/{sha}{path.suffix}"
                    given[record[kind]] = sha
        elif call is not None and isinstance(call.argument, Proposal):
            given[SPACE] = self._send(self._run.path(SPACE))
        return record, Parcel(self._version, self._listing, self._files(given))

    def _paths(self) -> Iterator[Path]:
        for name in LISTED:
            top = self._run.path(name)
            for path in [top] if top.is_file() else sorted(top.rglob("*")):
                if path.is_file() and not any(
                    part.startswith(".") for part in path.relative_to(self._run.folder).parts
                ):
                    yield path

    def _list(self, listed: dict[str, str]) -> None:
        if listed != self._listed:
            self._listed, self._version = listed, digest(listed)
            self._listing = [self._put(self._files(listed))]

    def _files(self, hashes: Mapping[str, str]) -> Files:
        return {name: (sha, [self._places[sha]]) for name, sha in hashes.items()}

    def _send(self, path: Path) -> str:
        """Return the hash of a file that the object store has from now on."""
        stat = path.stat()
        stamp = (stat.st_mtime_ns, stat.st_size)
        if path not in self._known or self._known[path][0] != stamp:
            # mapped: the only copy that is made is that of the object store
            data = np.asarray(np.memmap(path, mode="r")) if stat.st_size else np.zeros(0, dtype=np.uint8)
            sha = hashlib.sha256(data.data).hexdigest()
            if sha not in self._places:
                self._places[sha] = self._stored(path, data)
            self._known[path] = (stamp, sha)
        return self._known[path][1]

    def _stored(self, path: Path, data: np.ndarray) -> Any:
        from ray.exceptions import RayError

        try:
            return self._put(data)
        except RayError as error:
            raise QuantDMError(
                f"ray: the object store has no room for {path.name} ({len(data):,} bytes): {error!s:.200}; start "
                "the cluster with more --object-store-memory, or with more disk to spill to"
            ) from None
