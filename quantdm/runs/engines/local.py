"""Run jobs: in this process, or in one single-threaded process per core."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import torch

from quantdm.machine import cores
from quantdm.pipelines.loading import DiffusionPipeline
from quantdm.runs.evaluator import Evaluator
from quantdm.runs.run import Run

_EVALUATOR: Evaluator | None = None  # of a worker process


class Engine:
    """Map a method of `Evaluator` over arguments, on all cores where the pipeline can be loaded again by name.

    With another busy process a two-threaded forward can slow down thirty-fold, because OpenMP threads spin: so workers
    have one thread each.
    """

    def __init__(self, run: Run, *, pipe: DiffusionPipeline | None = None, workers: int | None = None) -> None:
        self.run = run
        self.workers = 1 if pipe is not None or torch.cuda.is_available() else workers or cores()
        self._pipe = pipe
        self._local: Evaluator | None = None
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._pool is not None:
            if kind is not None:  # interrupted: what is in flight is lost, what is finished is on disk
                for process in list((self._pool._processes or {}).values()):
                    process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def local(self) -> Evaluator:
        """The evaluator of this process."""
        if self._local is None:
            self._local = Evaluator(self.run, self._pipe)
        return self._local

    def map(self, method: str, arguments: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield (index, result) of `Evaluator.method(argument)` in the order in which they finish."""
        if self.workers == 1 or len(arguments) <= 1:
            for index, argument in enumerate(arguments):
                yield index, getattr(self.local, method)(argument)
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(str(self.run.folder), os.getpid()),
            )
        futures: dict[Future, int] = {
            self._pool.submit(_work, method, argument): index for index, argument in enumerate(arguments)
        }
        pending = set(futures)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=lambda f: futures[f]):
                yield futures[future], future.result()


def _start_worker(folder: str, parent: int) -> None:
    global _EVALUATOR
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    _EVALUATOR = Evaluator(Run.open(folder))


def _die_with(parent: int) -> None:
    """End this worker when its parent was killed: nobody else would."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(method: str, argument: Any) -> Any:
    assert _EVALUATOR is not None
    return getattr(_EVALUATOR, method)(argument)
