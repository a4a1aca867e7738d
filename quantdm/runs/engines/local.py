"""Run jobs: in this process, or in one single-threaded process per core."""

import json
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from quantdm.errors import QuantDMError
from quantdm.machine import KEEP_MEMORY, cores, same_devices
from quantdm.pipelines.subject import Subject
from quantdm.processes import Process, asked, bury, launch
from quantdm.runs.engines.answer import OPEN, result_of
from quantdm.runs.engines.call import called
from quantdm.runs.evaluator import Evaluator
from quantdm.runs.run import Run

WORKER = "quantdm.runs.engines.worker"
# With another busy process a two-threaded forward can slow down thirty-fold, because OpenMP threads spin.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", **KEEP_MEMORY}
SOON = 0.05  # seconds between two questions where there is nothing to do
WAKE = 1.0  # seconds between two questions whether what is waited for has come from elsewhere
TRIES = 3  # workers that may end over one job
OPENING = 3600.0  # seconds that a worker may take to open its pipeline: it may have to be downloaded
LEAST_PATIENCE, HANGS_AFTER = 300.0, 30  # seconds, and times what the slowest job of its kind took for its size
_END, _NOTHING = -1, object()
Results = Generator[tuple[int, Any], None, None]  # who closes it wants no more


class Engine:
    """Map a method of `Evaluator` over arguments, on all cores where the pipeline can be opened again.

    Workers open the pipeline at the run's location, each on its own device, and check that it is the one that the run
    was started with. There is one per core, or one per accelerator; a single one works in this process.

    Args:
        workers: processes on the processor (None: one per core), or on each accelerator (None: one; several keep one
            busy that waits for the processor, as with small denoisers, and take as often the memory).
        batch_size: images at once at most ("auto": found from memory).
        devices: where workers load the pipeline, in turn (None: all devices of the kind on which the subject is).
    """

    def __init__(
        self,
        run: Run,
        subject: Subject,
        *,
        workers: int | None = None,
        batch_size: int | Literal["auto"] = "auto",
        devices: Sequence[str] | None = None,
    ) -> None:
        self.run = run
        self.subject = subject
        self.batch_size: int | Literal["auto"] = batch_size
        self.devices = tuple(devices or same_devices(subject.device))
        self.workers = 1 if subject.location is None else workers_on(subject, self.devices, workers)
        self._slowest: dict[str, float] = {}  # kind of job -> seconds per unit of its size
        self._closing = False
        self._opened: set[Process] = set()  # workers that have their pipeline
        self._busy: set[int] = set()  # places whose workers are at a job
        self._processes: list[Process] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close(now=kind is not None)  # interrupted: what is in flight is lost, what is finished is on disk

    def close(self, *, now: bool = False) -> None:
        """End the workers: at once, or when they have finished what they are doing."""
        self._closing = True
        for process in self._processes:
            assert process.stdin is not None
            process.kill() if now else process.stdin.close()
        for thread in self._threads:
            while thread.is_alive():
                for process in self._processes if now else ():  # a thread may have replaced one that had died
                    process.kill()
                thread.join(0.2)
        for process in self._processes:
            bury(process)
        self._processes, self._threads, self._closing = [], [], False

    @property
    def accelerators(self) -> float:
        """How many accelerators work."""
        return 0.0 if self.subject.device.type == "cpu" else float(min(self.workers, len(set(self.devices))))

    @cached_property
    def local(self) -> Evaluator:
        """The evaluator of this process."""
        return Evaluator(self.run, self.subject, batch_size=self.batch_size)

    def map(
        self,
        method: str,
        arguments: Iterable[Any],
        *,
        at_most: int | None = None,
        until: Callable[[], bool] = lambda: False,
    ) -> Results:
        """Yield (index, result) of `Evaluator.method(argument)` in the order in which they finish.

        Arguments are taken when a worker is free for one; there are `at_most` so many, and a single one is not worth
        starting workers. One that is a `Call` names its own method; None means that there is nothing now. A job whose
        worker dies or hangs is given to a new worker. Who closes the iterator does not wait for what is in flight;
        it ends so by itself once `until` says that nobody needs it, which is asked while it waits.

        Raises:
            QuantDMError: what a job raised, or a job whose workers ended again and again.
        """
        count = len(arguments) if isinstance(arguments, Sequence) else at_most
        if self.workers == 1 or count in (0, 1):
            for index, argument in enumerate(arguments):
                call = called(method, argument)
                yield index, getattr(self.local, call.method)(call.argument)
            return
        source, done = _Source(method, arguments), queue.SimpleQueue[tuple[int, Any]]()
        self._begin(source, done)
        working = len(self._threads)
        try:
            while working:
                try:
                    index, answer = done.get(timeout=WAKE)
                except queue.Empty:
                    if until():
                        return
                    continue
                if isinstance(answer, BaseException):
                    self.close(now=True)
                    raise answer
                if index == _END:
                    working -= 1
                else:
                    yield index, answer
        finally:
            if working:
                self._abandon(source)

    def _begin(self, source: "_Source", done: "queue.SimpleQueue[tuple[int, Any]]") -> None:
        """Start the workers that are not there, and let them work."""
        if not self._processes:
            self._processes = [self._start(place) for place in range(self.workers)]
        for place, process in enumerate(self._processes):
            if process.poll() is not None:  # what it did was abandoned
                bury(process)
                self._processes[place] = self._start(place)
        self._threads = [
            threading.Thread(target=self._serve, args=(place, source, done), daemon=True)
            for place in range(self.workers)
        ]
        for thread in self._threads:
            thread.start()

    def _abandon(self, source: "_Source") -> None:
        """End what nobody wants any more, and the workers that are at it; those that are idle stay."""
        source.over = True
        for place, thread in enumerate(self._threads):
            while thread.is_alive():
                thread.join(SOON)
                if thread.is_alive() and place in self._busy and place < len(self._processes):
                    self._processes[place].kill()

    def _serve(self, place: int, source: "_Source", done: "queue.SimpleQueue[tuple[int, Any]]") -> None:
        """Give the worker of a place jobs until none is left; results, or the error that ends it all, go to `done`."""
        try:
            while not self._closing and (job := source.next()) is not None:
                index, line, kind, size = job
                if index == _END:
                    time.sleep(SOON)
                    continue
                answer: Any = None
                for _ in range(TRIES):
                    self._busy.add(place)
                    answer = self._ask(place, line, kind, size)
                    self._busy.discard(place)
                    if not isinstance(answer, _Ended) or self._closing or source.over:
                        break  # at the end nobody needs a new worker
                    bury(self._processes[place])
                    self._processes[place] = self._start(place)
                done.put((index, answer.error() if isinstance(answer, _Ended) else answer))
        except BaseException as error:  # what the source raised is the caller's
            done.put((_END, error))
        else:
            done.put((_END, None))

    def _ask(self, place: int, line: str, kind: str, size: int) -> Any:
        """Return the answer of a place's worker, or `_Ended` if it died or hung."""
        process = self._processes[place]
        if process not in self._opened:
            opened = self._exchange(process, json.dumps({"method": OPEN, "argument": None}), OPENING)
            if opened is not None:
                return opened
            self._opened.add(process)
        start = time.monotonic()
        # the first of a kind may take as long as it takes
        answer = self._exchange(process, line, self._patience(kind, size) if kind in self._slowest else None)
        if not isinstance(answer, _Ended):
            self._slowest[kind] = max(self._slowest.get(kind, 0.0), (time.monotonic() - start) / size)
        return answer

    def _exchange(self, process: Process, line: str, patience: float | None) -> Any:
        """Return a worker's answer to a line, or `_Ended` if it died, or did not answer within `patience` seconds."""
        watch = None if patience is None else threading.Timer(patience, process.kill)
        if watch is not None:
            watch.daemon = True
            watch.start()
        try:
            answer = asked(process, line)
        finally:
            if watch is not None:
                watch.cancel()
        return _Ended(process) if answer is None else result_of(answer)

    def _patience(self, kind: str, size: int) -> float:
        """Return the seconds after which a job counts as hung: many times the slowest one of its kind so far."""
        return max(LEAST_PATIENCE, HANGS_AFTER * size * self._slowest.get(kind, 0.0))

    def _start(self, place: int) -> Process:
        device = self.devices[place % len(self.devices)]
        return launch(WORKER, str(self.run.folder), device, str(self.batch_size), environment=ENVIRONMENT)


def workers_on(subject: Subject, devices: Sequence[str], workers: int | None) -> int:
    """Return how many processes share the work: on the processor, or on all of some accelerators together."""
    return (workers or cores()) if subject.device.type == "cpu" else len(devices) * (workers or 1)


class _Source:
    """Numbered jobs as lines, taken by several threads; the arguments are made one at a time."""

    def __init__(self, method: str, arguments: Iterable[Any]) -> None:
        self._method, self._arguments = method, iter(arguments)
        self._count, self._lock = 0, threading.Lock()
        self.over = False  # nobody wants more

    def next(self) -> tuple[int, str, str, int] | None:
        """Return index, line, kind and size of the next job, or None; _END as index: nothing now, ask again."""
        with self._lock:
            argument = _NOTHING if self.over else next(self._arguments, _NOTHING)
            if argument is _NOTHING:
                return None
            if argument is None:
                return _END, "", "", 1
            index, self._count = self._count, self._count + 1
        call = called(self._method, argument)
        return index, json.dumps({"method": call.method, "argument": call.record}), *call.effort


@dataclass(frozen=True)
class _Ended:
    """A worker that ended in the middle of a job."""

    process: Process

    def error(self) -> QuantDMError:
        return QuantDMError(
            f"a job ended {TRIES} worker processes (the last with exit code {self.process.wait()}); what they said "
            "stands above. If memory ran out, use fewer workers; run the same command again to go on"
        )
