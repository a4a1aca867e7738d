"""Run jobs: in this process, or in one single-threaded process per core."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quantdm.errors import QuantDMError
from quantdm.machine import cores
from quantdm.pipelines.subject import Subject
from quantdm.runs.evaluator import Evaluator
from quantdm.runs.run import Run

WORKER = "quantdm.runs.engines.worker"
PACKAGE = Path(__file__).resolve().parents[3]
# With another busy process a two-threaded forward can slow down thirty-fold, because OpenMP threads spin.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
PATIENCE = 5.0  # seconds that a worker may take to end


class Engine:
    """Map a method of `Evaluator` over arguments, on all cores where the pipeline can be opened again.

    Workers open the pipeline at the run's location and check that it is the one that the run was started with. A
    pipeline on an accelerator is measured in this process.
    """

    def __init__(self, run: Run, subject: Subject, *, workers: int | None = None) -> None:
        self.run = run
        self.subject = subject
        alone = subject.device.type != "cpu" or subject.location is None
        self.workers = 1 if alone else workers or cores()
        self._processes: list[subprocess.Popen[str]] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.close(now=kind is not None)  # interrupted: what is in flight is lost, what is finished is on disk

    def close(self, *, now: bool = False) -> None:
        """End the workers: at once, or when they have finished what they are doing."""
        for process in self._processes:
            assert process.stdin is not None
            process.kill() if now else process.stdin.close()
        for process in self._processes:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was still to be written has no reader any more
                    assert pipe is not None
                    pipe.close()
        self._processes, self._threads = [], []

    @cached_property
    def local(self) -> Evaluator:
        """The evaluator of this process."""
        return Evaluator(self.run, self.subject)

    def map(self, method: str, arguments: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield (index, result) of `Evaluator.method(argument)` in the order in which they finish.

        Raises:
            QuantDMError: what a job raised, or a worker that ended.
        """
        if self.workers == 1 or len(arguments) <= 1:
            for index, argument in enumerate(arguments):
                yield index, getattr(self.local, method)(argument)
            return
        if not self._processes:
            self._processes = [self._start() for _ in range(self.workers)]
        todo: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        for index, argument in enumerate(arguments):
            plain = asdict(argument) if is_dataclass(argument) and not isinstance(argument, type) else argument
            todo.put((index, json.dumps({"method": method, "argument": plain})))
        self._threads = [
            threading.Thread(target=_serve, args=(process, todo, done), daemon=True) for process in self._processes
        ]
        for thread in self._threads:
            thread.start()
        for _ in arguments:
            index, answer = done.get()
            if isinstance(answer, QuantDMError):
                self.close(now=True)
                raise answer
            yield index, answer

    def _start(self) -> "subprocess.Popen[str]":
        path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
        return subprocess.Popen(
            [sys.executable, "-m", WORKER, str(self.run.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is this process's to handle
        )


def _serve(
    process: "subprocess.Popen[str]",
    todo: "queue.SimpleQueue[tuple[int, str]]",
    done: "queue.SimpleQueue[tuple[int, Any]]",
) -> None:
    """Give one worker jobs until none is left; results, or the error that ends it all, go into `done`."""
    assert process.stdin is not None
    assert process.stdout is not None
    while True:
        try:
            index, job = todo.get_nowait()
        except queue.Empty:
            return
        try:
            process.stdin.write(job + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except (OSError, ValueError):  # it ended, or was ended
            line = ""
        done.put((index, _result(line, process)))


def _result(line: str, process: "subprocess.Popen[str]") -> Any:
    if not line:
        return QuantDMError(
            f"a worker process ended (exit code {process.wait()}); what it said stands above. If memory ran out, use "
            "fewer workers; run the same command again to go on"
        )
    answer = json.loads(line)
    if "traceback" in answer:
        return QuantDMError(f"a worker process failed:\n{answer['traceback']}")
    return QuantDMError(answer["error"]) if "error" in answer else answer["result"]
