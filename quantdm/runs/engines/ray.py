"""Run jobs on a Ray cluster: the same worker as an actor, wherever the cluster has room for one.

Ray moves what workers need: the files of the run directory travel by their content through its object store, so no
worker needs the driver's disk. A named pipeline is opened where the worker runs: embedded, from the hub, or from a
directory that every node has; one that was changed after loading travels with the run.
"""

import contextlib
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from quantdm.errors import QuantDMError
from quantdm.pipelines.subject import Subject
from quantdm.runs.engines.answer import value_of
from quantdm.runs.engines.call import Call, called
from quantdm.runs.engines.cluster import STARTING, connect, no_place, room
from quantdm.runs.engines.local import OPENING, SOON, TRIES, Engine, Results
from quantdm.runs.engines.mirror import sweep_here
from quantdm.runs.engines.outbox import Outbox
from quantdm.runs.engines.remote import RemoteWorker, facts_of
from quantdm.runs.run import Run

_log = logging.getLogger("quantdm")

TIDYING = 10.0  # seconds that nodes may take to remove what workers fetched


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

    A job whose node or worker is lost is given to a new actor, which Ray places where there is room. An actor first
    gets a place, then opens the pipeline, then answers jobs; only those have to be answered in time.

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
        self._ray, self._connected = connect(address, workers)
        self.workers, self.gpus = room(self._ray, workers, gpus)
        self._actors: list[Any] = [None] * self.workers
        self._starting: dict[Any, int] = {}  # what an actor answers when it has a place -> which one
        self._loading: dict[Any, int] = {}  # and when it has opened the pipeline
        self._since: dict[int, float] = {}  # place -> since when it opens the pipeline
        self._failed = Counter[int]()  # place -> actors in a row that ended before they had
        self._folders: dict[str, list[str]] = defaultdict(list)  # node -> what actors have there
        self._began = time.monotonic()  # since when no actor has a place
        self._outbox = Outbox(run, self._ray.put)
        _tell_apart(subject, self.device)

    @property
    def accelerators(self) -> float:
        """How many accelerators work: fractions count as such."""
        return self.workers * self.gpus

    @property
    def device(self) -> str:
        """Where workers load the pipeline."""
        return "cuda" if self.gpus else "cpu"

    @cached_property
    def _facts(self) -> dict[str, str]:
        return facts_of(self.run.settings.protocol)

    def map(
        self,
        method: str,
        arguments: Iterable[Any],
        *,
        at_most: int | None = None,
        until: Callable[[], bool] = lambda: False,
    ) -> Results:
        """Yield (index, result) in the order in which they finish; see `Engine.map`.

        Raises:
            QuantDMError: what a job raised, a job whose workers were lost again and again, workers that cannot start,
                or no room for one.
        """
        if (len(arguments) if isinstance(arguments, Sequence) else at_most) == 0:
            return
        source, count, over = iter(arguments), 0, False
        asked: dict[Any, _Asked] = {}
        again: list[_Asked] = []  # what lost workers were at
        self._outbox.look()
        self._began = time.monotonic()
        for place in range(self.workers):
            if self._actors[place] is None:
                self._start_at(place)
        busy = {*self._starting.values(), *self._loading.values()}
        idle = [place for place in range(self.workers) if place not in busy]
        try:
            while (asked or again or not over) and not until():
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
        """End the workers and remove what they fetched; disconnect from a cluster that this engine connected to."""
        for place in range(self.workers):
            self._end(place)
        with contextlib.suppress(self._ray.exceptions.RayError):  # the cluster may be gone
            self._tidy()
        if self._connected:
            self._ray.shutdown()

    def _answers(self, asked: dict[Any, _Asked], again: list[_Asked], idle: list[int]) -> Iterator[tuple[_Asked, Any]]:
        """Yield what is finished now; what a lost worker was at goes to `again`, places that are ready to `idle`."""
        if not asked and not self._starting and not self._loading:
            time.sleep(SOON)
            return
        ready, _ = self._ray.wait([*asked, *self._starting, *self._loading], num_returns=1, timeout=10 * SOON)
        for reference in ready:
            found = asked.pop(reference, None)
            try:
                answer = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:  # of the worker, its node, its memory, the object store
                again += self._lose(self._place_of(reference) if found is None else found.place, found, str(error))
                continue
            if found is None:
                idle += self._come_up(reference, answer)
                continue
            self._learn(found)
            self._outbox.receive(answer.files)
            yield found, value_of(answer.record)
        for reference, found in [item for item in asked.items() if self._hangs(item[1])]:
            del asked[reference]
            again += self._lose(found.place, found, "it hung")
        for place in [place for place in self._loading.values() if time.monotonic() - self._since[place] > OPENING]:
            again += self._lose(place, None, f"the pipeline was not open in {OPENING:.0f} s")
        if len(self._starting) == self.workers and time.monotonic() - self._began > STARTING:
            raise no_place(self.gpus)

    def _place_of(self, reference: Any) -> int:
        return self._starting[reference] if reference in self._starting else self._loading[reference]

    def _come_up(self, reference: Any, answer: Any) -> list[int]:
        """Let an actor that has a place open the pipeline; return the place of one that has done so."""
        if reference in self._starting:
            place = self._starting.pop(reference)
            node, folder = answer
            self._folders[node].append(folder)
            self._since[place] = time.monotonic()
            self._loading[self._actors[place].load.remote(self._outbox.parcel()[1])] = place
            return []
        place = self._loading.pop(reference)
        value_of(answer.record)
        del self._failed[place]
        return [place]

    def _lose(self, place: int, found: _Asked | None, why: str) -> list[_Asked]:
        """Start another actor in place of a lost one; return what that was at."""
        self._end(place)
        if found is None:
            self._failed[place] += 1
        what, tries = ("a worker", self._failed[place]) if found is None else ("a job", found.tries)
        if tries >= TRIES:
            failed = "could not start" if found is None else "lost its worker"
            raise QuantDMError(f"ray: {what} {failed} {TRIES} times, the last because: {_shortened(why)}")
        self._start_at(place)
        return [] if found is None else [found]

    def _ask(self, asked: dict[Any, _Asked], what: _Asked, place: int) -> None:
        what = replace(what, place=place, begun=time.monotonic(), tries=what.tries + 1)
        record, parcel = self._outbox.parcel(what.call)
        asked[self._actors[place].answer.remote(what.call.method, record, parcel)] = what

    def _learn(self, found: _Asked) -> None:
        kind, size = found.call.effort
        took = (time.monotonic() - found.begun) / size
        self._slowest[kind] = max(self._slowest.get(kind, 0.0), took)

    def _hangs(self, found: _Asked) -> bool:
        kind, size = found.call.effort
        return kind in self._slowest and time.monotonic() - found.begun > self._patience(kind, size)

    def _start_at(self, place: int) -> None:
        remote = self._ray.remote(RemoteWorker).options(num_cpus=1, num_gpus=self.gpus)
        self._actors[place] = remote.remote(self.device, self.batch_size, self._facts)
        self._starting[self._actors[place].ready.remote()] = place
        if len(self._starting) == self.workers:
            self._began = time.monotonic()

    def _end(self, place: int) -> None:
        if self._actors[place] is not None:
            with contextlib.suppress(Exception):  # it may be gone, and its node
                self._ray.kill(self._actors[place])
        self._actors[place] = None
        self._starting = {reference: other for reference, other in self._starting.items() if other != place}
        self._loading = {reference: other for reference, other in self._loading.items() if other != place}

    def _tidy(self) -> None:
        """Remove what workers fetched, on every node that is still there."""
        if not self._folders or not self._ray.is_initialized():
            return
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task = self._ray.remote(sweep_here)
        asked = [
            task.options(
                num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(folders)
            for node, folders in self._folders.items()
        ]
        self._folders.clear()
        self._ray.wait(asked, num_returns=len(asked), timeout=TIDYING)


def _shortened(why: str) -> str:
    """Return the first line of what Ray says and the last, which has the reason: a stack lies between."""
    lines = why.strip().splitlines() or [""]
    return " ... ".join(dict.fromkeys((f"{lines[0]:.150}", f"{lines[-1].strip():.300}")))


def _tell_apart(subject: Subject, device: str) -> None:
    """Say what is computed elsewhere than by the workers if that is another kind of device."""
    if subject.device.type != device:
        _log.warning(
            "ray: workers are on %s, this process is on %s: calibration, bank, tuning and the statistics of the "
            "correction are computed here, and the dtype of images is what is fast here unless --dtype says; start "
            "from a node that is like the workers' (docs/cluster.md)",
            device,
            subject.device.type,
        )
