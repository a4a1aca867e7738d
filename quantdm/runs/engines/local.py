"""Run jobs: in this process, or in one single-threaded process per core."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from quantdm.errors import QuantDMError
from quantdm.machine import cores, same_devices
from quantdm.metrics.samples import Draw
from quantdm.pipelines.subject import Subject
from quantdm.runs.evaluator import Evaluator
from quantdm.runs.run import Run

WORKER = "quantdm.runs.engines.worker"
PACKAGE = Path(__file__).resolve().parents[3]
# With another busy process a two-threaded forward can slow down thirty-fold, because OpenMP threads spin.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
PATIENCE = 5.0  # seconds that a worker may take to end
TRIES = 3  # workers that may end over one job
LEAST_PATIENCE, HANGS_AFTER = 300.0, 30  # seconds, and times what the slowest job of its kind took for its size
_END, _NOTHING = -1, object()


class Engine:
    """Map a method of `Evaluator` over arguments, on all cores where the pipeline can be opened again.

    Workers open the pipeline at the run's location, each on its own device, and check that it is the one that the run
    was started with. There is one per core, or one per accelerator; a single one works in this process.

    Args:
        workers: processes on a processor (None: one per core).
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
        on_cpu = subject.device.type == "cpu"
        self.workers = 1 if subject.location is None else (workers or cores()) if on_cpu else len(self.devices)
        self._slowest: dict[str, float] = {}  # kind of job -> seconds per unit of its size
        self._closing = False
        self._processes: list[subprocess.Popen[str]] = []
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
            _bury(process)
        self._processes, self._threads, self._closing = [], [], False

    @cached_property
    def local(self) -> Evaluator:
        """The evaluator of this process."""
        return Evaluator(self.run, self.subject, batch_size=self.batch_size)

    def map(self, method: str, arguments: Iterable[Any], *, at_most: int | None = None) -> Iterator[tuple[int, Any]]:
        """Yield (index, result) of `Evaluator.method(argument)` in the order in which they finish.

        Arguments are taken when a worker is free for one; there are `at_most` so many, and a single one is not worth
        starting workers. A job whose worker dies or hangs is given to a new worker.

        Raises:
            QuantDMError: what a job raised, or a job whose workers ended again and again.
        """
        count = len(arguments) if isinstance(arguments, Sequence) else at_most
        if self.workers == 1 or count in (0, 1):
            for index, argument in enumerate(arguments):
                yield index, getattr(self.local, method)(argument)
            return
        if not self._processes:
            self._processes = [self._start(place) for place in range(self.workers)]
        source, done = _Source(method, arguments), queue.SimpleQueue[tuple[int, Any]]()
        self._threads = [
            threading.Thread(target=self._serve, args=(place, source, done), daemon=True)
            for place in range(self.workers)
        ]
        for thread in self._threads:
            thread.start()
        working = len(self._threads)
        while working:
            index, answer = done.get()
            if isinstance(answer, BaseException):
                self.close(now=True)
                raise answer
            if index == _END:
                working -= 1
            else:
                yield index, answer

    def _serve(self, place: int, source: "_Source", done: "queue.SimpleQueue[tuple[int, Any]]") -> None:
        """Give the worker of a place jobs until none is left; results, or the error that ends it all, go to `done`."""
        try:
            while not self._closing and (job := source.next()) is not None:
                index, line, kind, size = job
                answer: Any = None
                for _ in range(TRIES):
                    answer = self._ask(place, line, kind, size)
                    if not isinstance(answer, _Ended) or self._closing:
                        break  # at the end nobody needs a new worker
                    _bury(self._processes[place])
                    self._processes[place] = self._start(place)
                done.put((index, answer.error() if isinstance(answer, _Ended) else answer))
        except BaseException as error:  # what the source raised is the caller's
            done.put((_END, error))
        else:
            done.put((_END, None))

    def _ask(self, place: int, line: str, kind: str, size: int) -> Any:
        """Return the answer of a place's worker, or `_Ended` if it died or hung."""
        process, start = self._processes[place], time.monotonic()
        assert process.stdin is not None
        assert process.stdout is not None
        watch = threading.Timer(self._patience(kind, size), process.kill)
        watch.daemon = True
        if kind in self._slowest:  # the first of a kind may take as long as it takes
            watch.start()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except (OSError, ValueError):  # it ended, or was ended
            answer = ""
        finally:
            watch.cancel()
        if not answer:
            return _Ended(process)
        self._slowest[kind] = max(self._slowest.get(kind, 0.0), (time.monotonic() - start) / size)
        return _result(answer)

    def _patience(self, kind: str, size: int) -> float:
        """Return the seconds after which a job counts as hung: many times the slowest one of its kind so far."""
        return max(LEAST_PATIENCE, HANGS_AFTER * size * self._slowest.get(kind, 0.0))

    def _start(self, place: int) -> "subprocess.Popen[str]":
        device = self.devices[place % len(self.devices)]
        path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
        return subprocess.Popen(
            [sys.executable, "-m", WORKER, str(self.run.folder), device, str(self.batch_size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is this process's to handle
        )


class _Source:
    """Numbered jobs as lines, taken by several threads; the arguments are made one at a time."""

    def __init__(self, method: str, arguments: Iterable[Any]) -> None:
        self._method, self._arguments = method, iter(arguments)
        self._count, self._lock = 0, threading.Lock()

    def next(self) -> tuple[int, str, str, int] | None:
        """Return index, line, kind and size of the next job, or None."""
        with self._lock:
            argument = next(self._arguments, _NOTHING)
            if argument is _NOTHING:
                return None
            index, self._count = self._count, self._count + 1
        plain = asdict(argument) if is_dataclass(argument) and not isinstance(argument, type) else argument
        draw = getattr(argument, "draw", argument)
        kind, size = ("images", draw.images * draw.steps) if isinstance(draw, Draw) else (self._method, 1)
        return index, json.dumps({"method": self._method, "argument": plain}), kind, max(size, 1)


def _bury(process: "subprocess.Popen[str]") -> None:
    """Close what leads to a worker, which ends it if it has not ended yet, and wait for that."""
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was still to be written has no reader any more
            assert pipe is not None
            pipe.close()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class _Ended:
    """A worker that ended in the middle of a job."""

    process: "subprocess.Popen[str]"

    def error(self) -> QuantDMError:
        return QuantDMError(
            f"a job ended {TRIES} worker processes (the last with exit code {self.process.wait()}); what they said "
            "stands above. If memory ran out, use fewer workers; run the same command again to go on"
        )


def _result(line: str) -> Any:
    answer = json.loads(line)
    if "traceback" in answer:
        return QuantDMError(f"a worker process failed:\n{answer['traceback']}")
    return QuantDMError(answer["error"]) if "error" in answer else answer["result"]
