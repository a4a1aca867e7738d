"""Build the layers of a bank in processes of their own: `python -m quantdm.runs.bank_processes` is one of them.

Quantizing is a long chain of small operations, and each passes the interpreter's lock on: two threads take longer than
one, two processes half as long. Layers travel as files, what is to be done and what came of it as lines of JSON.
"""

import contextlib
import json
import queue
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from quantdm.errors import QuantDMError
from quantdm.files import load_tensors, save_tensors
from quantdm.quantizers import Moments
from quantdm.runs.bank_layer import Address, LayerBuild
from quantdm.runs.processes import Process, answering, asked, bury, launch

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # it works on one core, and never on an accelerator


class BankProcesses:
    """Processes that are started when they are needed, until `end`."""

    def __init__(self) -> None:
        self._idle: queue.SimpleQueue[Process] = queue.SimpleQueue()
        self._started: list[Process] = []

    def end(self) -> None:
        """End the processes, whatever they are at: a file is whole or not there."""
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
            process = launch(__name__, environment=ENVIRONMENT)
            self._started.append(process)
        job = {"task": task.to_dict(), "path": str(address.path), "of": address.of}
        job["moments"] = None if moments is None else str(moments)
        with _handed(weight, task.folder) as path:
            answer = asked(process, json.dumps(job | {"weight": str(path)}))
        if answer is None:
            raise QuantDMError(
                f"{task.layer.name}: the process that quantized it ended with exit code {process.wait()}; if memory "
                "ran out, free some; run the same command again to go on"
            )
        self._idle.put(process)
        if "error" in answer:
            raise QuantDMError(answer["error"])
        return Path(answer["path"])


@contextmanager
def _handed(weight: torch.Tensor, folder: Path) -> Iterator[Path]:
    """Yield a file with a weight; whoever reads it deletes it, so that a search that is killed later leaves none."""
    path = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        save_tensors(path, {"weight": weight})
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
