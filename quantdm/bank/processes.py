"""Quantize layers in processes of their own: `python -m quantdm.bank.processes` is one of them.

Quantizing is a long chain of small operations, and each passes the interpreter's lock on: two threads take longer than
one, two processes half as long. Layers travel as files, what is to be done and what came of it as lines of JSON.
"""

import contextlib
import json
import math
import queue
import sys
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from quantdm.bank.layer_build import Address, LayerBuild
from quantdm.errors import QuantDMError
from quantdm.files import load_tensors, save_tensors
from quantdm.machine import BYTES_PER_WEIGHT
from quantdm.processes import Process, answering, asked, bury, launch
from quantdm.quantizers import Moments
from quantdm.quantizers.options import SWEEPS
from quantdm.quantizers.weight import halves
from quantdm.schemes import Scheme

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # it works on one core, and never on an accelerator

SMALL, CALIBRATED = 2**26, 16  # weights times options, calibrated ones so many times: done before processes start


def worth_processes(layers: Iterable[tuple[int, Sequence[Scheme]]], sweeps: int = SWEEPS) -> bool:
    """Whether quantizing layers, each so many weights under some options, takes longer than processes take to start."""
    calibrated = CALIBRATED * max(sweeps, 1)
    work = sum(
        weights * sum(1 if option.calibration is None else calibrated for option in options)
        for weights, options in layers
    )
    return work >= SMALL


def room_of(shape: Sequence[int], options: Sequence[Scheme], split: int | None) -> int:
    """Return as how many weights a layer counts when memory is shared: the moments of its columns count as well.

    Error feedback holds them twice, those of one half of a split weight at a time, in float32.
    """
    if all(option.calibration != "feedback" for option in options):
        return math.prod(shape)
    widest = max(columns.stop - columns.start for _, columns in halves(tuple(shape), split))
    return math.prod(shape) + 2 * 4 * widest**2 // BYTES_PER_WEIGHT


class LayerProcesses:
    """Processes that are started when they are needed, until `end`."""

    def __init__(self) -> None:
        self._idle: queue.SimpleQueue[Process] = queue.SimpleQueue()
        self._started: list[Process] = []
        self._over, self._lock = False, threading.Lock()

    def end(self) -> None:
        """End the processes, whatever they are at: a file is whole or not there."""
        with self._lock:
            self._over = True
        for process in self._started:
            process.kill()
            bury(process)

    def build(self, task: LayerBuild, address: Address, weight: torch.Tensor, moments: Path | None) -> Path:
        """Build a layer in an idle process, or in a new one; as many work as threads call.

        Raises:
            QuantDMError: what the process raised, or that it ended.
        """
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = self._launched(task)
        job = {"task": task.to_dict(), "path": str(address.path), "of": address.of}
        job["moments"] = None if moments is None else str(moments)
        with _handed(weight, task.folder) as path:
            answer = asked(process, json.dumps(job | {"weight": str(path)}))
        if answer is None:
            raise QuantDMError(
                f"{task.name}: the process that quantized it ended with exit code {process.wait()}; if memory "
                "ran out, free some; run the same command again to go on"
            )
        self._idle.put(process)
        if "error" in answer:
            raise QuantDMError(answer["error"])
        return Path(answer["path"])

    def _launched(self, task: LayerBuild) -> Process:
        with self._lock:
            if self._over:  # while this thread was on its way
                raise QuantDMError(f"{task.name}: was not quantized, as another layer failed")
            process = launch(__name__, environment=ENVIRONMENT)
            self._started.append(process)
            return process


@contextmanager
def _handed(weight: torch.Tensor, folder: Path) -> Iterator[Path]:
    """Yield a file with a weight; whoever reads it deletes it, so that a search that is killed later leaves none."""
    path = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        save_tensors(path, {"weight": weight}, durable=False)
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def file_of(moments: Mapping[str, Moments] | None, name: str) -> Path | None:
    """Return the file in which the moments of a layer are; None: they are in memory only."""
    path = getattr(moments, "path", None)
    return None if path is None else path(name)


def main() -> None:
    """Build layers as lines ask for, until there are no more."""
    torch.set_num_threads(1)
    answer = answering()
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer({"path": str(_built(job))})
        except QuantDMError as error:
            answer({"error": str(error)})


def _built(job: dict[str, Any]) -> Path:
    from quantdm.activations.moments import moments_in

    weight = load_tensors(job["weight"])[0]["weight"]
    with contextlib.suppress(OSError):  # Windows keeps what is mapped, until the caller deletes it
        Path(job["weight"]).unlink()
    moments = None if job["moments"] is None else moments_in(Path(job["moments"]))
    return LayerBuild.from_dict(job["task"]).make(weight, moments, Address(Path(job["path"]), job["of"]))


if __name__ == "__main__":
    main()
