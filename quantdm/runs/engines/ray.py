"""Run jobs on a Ray cluster: the same worker as an actor, wherever the cluster has room for one.

Ray moves what workers need: the files of the run directory travel by their content through its object store, so no
worker needs the driver's disk. A named pipeline is opened where the worker runs: embedded, from the hub, or from a
directory that every node has; one that was changed after loading travels with the run.
"""

import contextlib
import hashlib
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from quantdm.errors import QuantDMError
from quantdm.files import atomic_path
from quantdm.machine import versions
from quantdm.pipelines.subject import Subject
from quantdm.runs.engines.answer import result_of
from quantdm.runs.engines.call import Call, called
from quantdm.runs.engines.local import SOON, TRIES, Engine, Results
from quantdm.runs.engines.remote import GIVEN, RemoteWorker
from quantdm.runs.evaluator import Job
from quantdm.runs.run import MANIFEST, SNAPSHOT, Run

SENT = (MANIFEST, "space.json", "bank", SNAPSHOT, "reference")  # of a run directory: what workers read
REACHED = 10.0  # seconds in which a cluster has to answer
STARTING = 300.0  # seconds that a cluster may take to give the first worker a place


@dataclass
class _Asked:
    """A call that an actor is at."""

    index: int
    call: Call
    place: int
    begun: float
    tries: int


class RayEngine(Engine):
    """Map a method of `Evaluator` over arguments, on the actors of a Ray cluster.

    A job whose node or worker is lost is given to a new actor, which Ray places where there is room.

    Args:
        address: of a cluster ("auto": the one that this machine belongs to; None: one of its own, here).
        workers: actors (None: as many as the cluster has room for now); more than fit make it grow, where it can.
        gpus: of every actor, a fraction too (None: 1 where the cluster has any, else 0).
        batch_size: images at once at most ("auto": found from memory).
    """

    def __init__(
        self,
        run: Run,
        subject: Subject,
        *,
        address: str | None = None,
        workers: int | None = None,
        gpus: float | None = None,
        batch_size: int | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(run, subject, batch_size=batch_size)
        self._ray, self._own_cluster = _connect(address, workers)
        resources = self._ray.cluster_resources()
        self.gpus = gpus if gpus is not None else float(resources.get("GPU", 0) > 0)
        room = int(resources.get("GPU", 0) / self.gpus) if self.gpus else int(resources.get("CPU", 0))
        self.workers = workers or max(room, 1)
        self._actors: list[Any] = [None] * self.workers
        self._starting: dict[Any, int] = {}  # what an actor answers when it has a place -> which one
        self._began = time.monotonic()
        self._sent: dict[str, Any] = {}  # hash of a file's content -> where the object store has it
        self._known: dict[Path, tuple[tuple[int, int], str]] = {}  # file -> (time and size, hash)

    @property
    def accelerators(self) -> float:
        """How many accelerators work: fractions count as such."""
        return self.workers * self.gpus

    def map(self, method: str, arguments: Iterable[Any], *, at_most: int | None = None) -> Results:
        """Yield (index, result) in the order in which they finish; see `Engine.map`.

        Raises:
            QuantDMError: what a job raised, a job whose workers were lost again and again, or no room for a worker.
        """
        if (len(arguments) if isinstance(arguments, Sequence) else at_most) == 0:
            return
        source, count, over = iter(arguments), 0, False
        asked: dict[Any, _Asked] = {}
        again: list[_Asked] = []  # what lost workers were at
        for place in range(self.workers):
            if self._actors[place] is None:
                self._start_at(place)
        idle = [place for place in range(self.workers) if place not in self._starting.values()]
        try:
            while asked or again or not over:
                while idle and (again or not over):
                    argument = again.pop() if again else next(source, self)
                    if argument is self or argument is None:
                        over = argument is self
                        break
                    if not isinstance(argument, _Asked):
                        argument, count = _Asked(count, called(method, argument), 0, 0.0, 0), count + 1
                    self._ask(asked, argument, idle.pop())
                for found, answer in self._answers(asked, again, idle):
                    idle.append(found.place)
                    yield found.index, answer
        finally:
            for left in asked.values():  # nobody wants it any more
                self._end(left.place)

    def close(self, *, now: bool = False) -> None:
        """End the workers, and the cluster if it is this engine's own."""
        for place in range(self.workers):
            self._end(place)
        if self._own_cluster:
            self._ray.shutdown()

    def _answers(self, asked: dict[Any, _Asked], again: list[_Asked], idle: list[int]) -> Iterator[tuple[_Asked, Any]]:
        """Yield what is finished now; what a lost worker was at goes to `again`, places that are ready to `idle`."""
        if not asked and not self._starting:
            time.sleep(SOON)
            return
        ready, _ = self._ray.wait([*asked, *self._starting], num_returns=1, timeout=10 * SOON)
        lost = (self._ray.exceptions.RayActorError, self._ray.exceptions.RayTaskError)
        for reference in ready:
            found = asked.pop(reference, None)
            place = self._starting.pop(reference) if found is None else found.place
            try:
                answer = self._ray.get(reference)
            except lost as error:
                again += self._lose(place, found, str(error))
                continue
            if found is None:
                idle.append(place)
                continue
            self._learn(found)
            self._receive(answer.files)
            result = result_of(answer.record)
            if isinstance(result, QuantDMError):
                raise result
            yield found, result
        for reference, found in [item for item in asked.items() if self._hangs(item[1])]:
            del asked[reference]
            again += self._lose(found.place, found, "it hung")
        if len(self._starting) == self.workers and time.monotonic() - self._began > STARTING:
            raise QuantDMError(
                f"ray: the cluster gave no worker a place in {STARTING:.0f} s (each needs 1 CPU, {self.gpus:g} GPU); "
                "see `ray status`, or ask for fewer GPUs per worker"
            )

    def _lose(self, place: int, found: _Asked | None, why: str) -> list[_Asked]:
        """Start another actor in place of a lost one; return what that was at."""
        self._end(place)
        if found is not None and found.tries >= TRIES:
            raise QuantDMError(f"ray: a job lost {TRIES} workers, the last because: {why:.300}")
        self._start_at(place)
        return [] if found is None else [found]

    def _ask(self, asked: dict[Any, _Asked], what: _Asked, place: int) -> None:
        what = replace(what, place=place, begun=time.monotonic(), tries=what.tries + 1)
        record, files = what.call.record, self._files()
        if isinstance(what.call.argument, Job):
            for kind in GIVEN:
                if record[kind] is not None:
                    record[kind], sent = self._given(Path(record[kind]))
                    files |= sent
        asked[self._actors[what.place].answer.remote(what.call.method, record, files)] = what

    def _learn(self, found: _Asked) -> None:
        kind, size = found.call.effort
        took = (time.monotonic() - found.begun) / size
        self._slowest[kind] = max(self._slowest.get(kind, 0.0), took)

    def _hangs(self, found: _Asked) -> bool:
        kind, size = found.call.effort
        return kind in self._slowest and time.monotonic() - found.begun > self._patience(kind, size)

    def _start_at(self, place: int) -> None:
        remote = self._ray.remote(RemoteWorker).options(num_cpus=1, num_gpus=self.gpus)
        actor = remote.remote("cuda" if self.gpus else "cpu", self.batch_size, versions())
        self._actors[place] = actor
        self._starting[actor.ready.remote()] = place

    def _end(self, place: int) -> None:
        if self._actors[place] is not None:
            with contextlib.suppress(Exception):  # it may be gone, and its node
                self._ray.kill(self._actors[place])
        self._actors[place] = None
        self._starting = {reference: other for reference, other in self._starting.items() if other != place}

    # ------------------------------------------------------------------------------------------------------ artifacts

    def _files(self) -> dict[str, tuple[str, list[Any]]]:
        """Return name in the run directory -> (hash of its content, its place in the object store)."""
        found = {}
        for name in SENT:
            top = self.run.path(name)
            paths = [top] if top.is_file() else top.rglob("*")
            for path in paths:
                if path.is_file() and not any(part.startswith(".") for part in path.relative_to(self.run.folder).parts):
                    found[path.relative_to(self.run.folder).as_posix()] = self._send(path)
        return found

    def _given(self, path: Path) -> tuple[str, dict[str, tuple[str, list[Any]]]]:
        """Return the name under which a worker finds a file that a job names, and the file."""
        sent = self._send(path)
        name = f"given/{sent[0]}{path.suffix}"
        return name, {name: sent}

    def _send(self, path: Path) -> tuple[str, list[Any]]:
        stat = path.stat()
        stamp = (stat.st_mtime_ns, stat.st_size)
        if path not in self._known or self._known[path][0] != stamp:
            data = path.read_bytes()
            sha = hashlib.sha256(data).hexdigest()
            self._known[path] = (stamp, sha)
            if sha not in self._sent:
                self._sent[sha] = self._ray.put(data)
        sha = self._known[path][1]
        return sha, [self._sent[sha]]  # in a list: Ray would fetch what stands alone

    def _receive(self, files: dict[str, bytes]) -> None:
        """Keep what a worker made for others: full-precision samples."""
        for name, data in files.items():
            if not self.run.path(name).is_file():
                with atomic_path(self.run.path(name)) as path:
                    path.write_bytes(data)


def _connect(address: str | None, workers: int | None) -> tuple[Any, bool]:
    """Return Ray, connected, and whether the cluster was started here."""
    try:
        import ray
    except ImportError:
        raise QuantDMError("engine ray: the package ray is not installed; pip install 'quantdm[ray]'") from None
    if ray.is_initialized():
        return ray, False
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        settings |= {"num_cpus": workers, "include_dashboard": False}
    try:
        _probe(address)
        ray.init(address=address, **settings)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise QuantDMError(
            f"ray: no cluster at {address}: {str(error).splitlines()[0]:.200}; expected auto, HOST:6379 or "
            "ray://HOST:10001 of one that runs (`ray status` there)"
        ) from None
    return ray, address is None


def _probe(address: str | None) -> None:
    """Raise OSError at once where nobody listens: Ray itself would try for a minute."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=REACHED).close()
