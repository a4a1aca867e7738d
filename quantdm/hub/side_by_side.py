"""Quantize the layers of a model side by side: in processes where that pays, else one after another."""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from quantdm.bank.layer_build import Address, LayerBuild
from quantdm.bank.processes import LayerProcesses, file_of, room_of, worth_processes
from quantdm.files import load_tensors, save_tensors
from quantdm.machine import IN_FLIGHT, Gate, cores, one_torch_thread
from quantdm.quantizers import Moments, QuantizedWeight, quantize_weight
from quantdm.quantizers.options import SWEEPS
from quantdm.schemes import Scheme

MOST = 16  # processes: each takes a quarter of a gigabyte before it has done anything


def processes_here() -> int:
    """Return how many layers are quantized at once: one per core, on large machines fewer."""
    return min(cores(), MOST)


@dataclass(frozen=True)
class Task:
    """One layer's weight and what it is quantized to; `split` as in `quantize_weight`."""

    name: str
    weight: torch.Tensor
    scheme: Scheme
    split: int | None


def quantize_tasks(
    tasks: Sequence[Task],
    moments: Mapping[str, Moments],
    sweeps: int,
    *,
    workers: int | None = None,
    progress: Callable[[], object],
) -> dict[str, QuantizedWeight]:
    """Return the quantized weight of every task by its name.

    Torch runs one thread per layer, so the result is the same for any number of cores. What an accelerator holds is
    quantized there, unless it is calibrated. Processes get their layers, and the moments that are in memory, through a
    temporary folder, a gigabyte at a time.

    Args:
        tasks: in the order in which moments are to be asked for.
        moments: of the layers whose scheme is calibrated.
        sweeps: as in `quantize_weight`.
        workers: layers at once (None: `processes_here`).
        progress: called after every layer.

    Raises:
        QuantDMError: as `quantize_weight`, or a process ended.
    """
    workers = workers or processes_here()
    apart = [task for task in tasks if task.weight.device.type == "cpu" or task.scheme.calibration is not None]
    if workers > 1 and worth_processes(((task.weight.numel(), [task.scheme]) for task in apart), sweeps):
        found = _in_processes(apart, moments, sweeps, workers, progress)
    else:
        found = {}
    for task in tasks:
        if task.name not in found:
            own = None if task.scheme.calibration is None else moments[task.name]
            with one_torch_thread():
                found[task.name] = quantize_task(task, own, sweeps)
            progress()
    return found


def _in_processes(
    tasks: Sequence[Task], moments: Mapping[str, Moments], sweeps: int, workers: int, progress: Callable[[], object]
) -> dict[str, QuantizedWeight]:
    gate, found = Gate(IN_FLIGHT), {}
    waiting: dict[Future[QuantizedWeight], str] = {}

    def take(future: Future[QuantizedWeight]) -> None:
        found[waiting.pop(future)] = future.result()
        progress()

    with threads_and_processes(workers, sweeps) as (pool, processes):
        for task in tasks:
            room = ExitStack()  # what is handed on takes memory and disk until it is done
            room.enter_context(gate.room(room_of(task.weight.shape, [task.scheme], task.split)))
            file = None if task.scheme.calibration is None else processes.hand_over(moments, task.name, room)
            waiting[pool.submit(_let_out, room, processes.quantize, task, file)] = task.name
            for future in [future for future in waiting if future.done()]:
                take(future)
        for future in as_completed(list(waiting)):
            take(future)
    return found


def _let_out(room: ExitStack, quantize: Callable[..., QuantizedWeight], *given: Any) -> QuantizedWeight:
    with room:
        return quantize(*given)


def _delete(file: Path) -> None:
    with suppress(OSError):  # Windows keeps what is mapped, until the folder goes
        file.unlink()


def quantize_task(task: Task, moments: Moments | None = None, sweeps: int = SWEEPS) -> QuantizedWeight:
    """Return the quantized weight of a task, made here."""
    return quantize_weight(task.weight, task.scheme, split=task.split, name=task.name, moments=moments, sweeps=sweeps)


@contextmanager
def threads_and_processes(workers: int, sweeps: int = SWEEPS) -> Iterator[tuple[ThreadPoolExecutor, "Processes"]]:
    """Yield threads, and the processes in which they may quantize, started when they are asked for."""
    folder = TemporaryDirectory(prefix="quantdm-")
    with folder, ThreadPoolExecutor(workers) as pool, Processes(Path(folder.name), sweeps) as processes:
        try:
            yield pool, processes
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # first: nobody begins another layer


class Processes:
    """Processes that quantize layers, each handed to one of them in a folder; several threads may ask at once."""

    def __init__(self, folder: Path, sweeps: int = SWEEPS) -> None:
        self.folder, self.sweeps = folder, sweeps
        self._processes = LayerProcesses()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.end()

    def hand_over(self, moments: Mapping[str, Moments], name: str, room: ExitStack) -> Path:
        """Return a file with the moments of a layer; one that is written for this goes when `room` is left."""
        file = file_of(moments, name)
        if file is None:
            own, file = moments[name], self.folder / uuid.uuid4().hex
            save_tensors(file, {"second": own.second}, {"count": own.count}, durable=False)
            room.callback(_delete, file)
        return file

    def quantize(self, task: Task, moments: Path | None = None) -> QuantizedWeight:
        """Return the quantized weight of a task, made in a process that is idle or in a new one.

        Raises:
            QuantDMError: as `quantize_weight`, or the process ended.
        """
        build = LayerBuild(self.folder, task.name, task.split, (task.scheme,), self.sweeps)
        address = Address(self.folder / uuid.uuid4().hex, "")
        path = self._processes.build(build, address, task.weight.detach().cpu(), moments)
        tensors = {key.split("/", 1)[1]: tensor.clone() for key, tensor in load_tensors(path)[0].items()}
        path.unlink()
        shape, dtype = task.weight.shape, task.weight.dtype
        weight = QuantizedWeight.from_tensors(task.scheme, shape, task.split, dtype, tensors)
        return weight.to(task.weight.device)
