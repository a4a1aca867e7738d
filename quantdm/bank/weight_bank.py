"""The bank: every layer quantized with every option, once; a configuration is swapped in, at once or when read."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import nn

from quantdm.bank.layer_build import BANK_VERSION, LayerBuild
from quantdm.bank.pointed import pointed
from quantdm.bank.processes import LayerProcesses, file_of, room_of, worth_processes
from quantdm.bank.weight_reader import weight_reader
from quantdm.denoisers.inventory import LayerRecord
from quantdm.errors import QuantDMError, nearest
from quantdm.files import load_tensors, metadata_of, open_tensors, read_json, write_json
from quantdm.machine import IN_FLIGHT, Gate, cores, free_bytes, one_torch_thread
from quantdm.quantizers import Moments, QuantizedWeight
from quantdm.quantizers.options import SWEEPS
from quantdm.schemes import Scheme

INDEX = "index.json"
CACHE_BYTES = 2**30


class WeightBank:
    """All options of all layers of one denoiser, packed on disk, one safetensors file per layer.

    Files are addressed by the content of the weight, the options and the moments, so building again costs a hash and a
    changed weight is never confused with an old one. They are memory-mapped when a layer is asked for. Where
    `cache_bytes` hold the decoded weights of a whole configuration they are kept, and the least recently used ones are
    dropped first; of larger denoisers none is, since each would be dropped before it is asked for again.
    """

    def __init__(
        self,
        folder: str | Path,
        layers: Sequence[LayerRecord],
        options: Sequence[Scheme],
        *,
        cache_bytes: int = CACHE_BYTES,
        sweeps: int = SWEEPS,
    ) -> None:
        self.folder = Path(folder)
        self.layers = {layer.name: layer for layer in layers}
        self.options = tuple(options)
        self.cache_bytes = cache_bytes
        self.sweeps = sweeps
        self._files: dict[str, Path] = {}
        self._loaded: dict[str, dict[str, QuantizedWeight]] = {}
        self._metadata: dict[str, dict[str, Any]] = {}
        self._dense: OrderedDict[tuple[str, Scheme, torch.dtype, torch.device], torch.Tensor] = OrderedDict()
        self._dense_bytes = 0
        self._num_weights = sum(layer.num_weights for layer in layers)

    def build(
        self,
        source: nn.Module | str | Path,
        *,
        moments: Mapping[str, Moments] | None = None,
        workers: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> "WeightBank":
        """Quantize what is not on disk yet, layer by layer; nothing of a finished layer stays in memory.

        Of a bank that was built here with other options, those that both have are kept.

        Args:
            source: the denoiser, or its safetensors file or folder of them.
            moments: of the inputs of every layer; needed when an option is calibrated.
            workers: layers at once, the largest first (None: one per core), in processes where the work is worth
                starting them and moments are on disk. Files are the same for any number. Torch runs one thread per
                layer meanwhile.
            progress: called with the number of weights of every layer that is done.

        Raises:
            QuantDMError: a weight is missing, of another shape, NaN or infinite; moments are missing or of another
                layer. Layers that are written stay.
        """
        read = weight_reader(source)
        if moments is not None:
            missing = [name for name in self.layers if name not in moments]
            if missing:
                raise QuantDMError(f"moments: none for {missing[0]}; {nearest(missing[0], moments)}")
        largest_first = sorted(self.layers.values(), key=lambda layer: -layer.num_weights)
        with one_torch_thread(), _Work(self, read, moments, workers or cores()) as work:
            for layer, path in work.all(largest_first):
                self._files[layer.name] = path
                if progress is not None:
                    progress(layer.num_weights)
        files = {name: self._files[name].name for name in self.layers}
        write_json(self.folder / INDEX, {"version": BANK_VERSION, "layers": files})
        return self

    @classmethod
    def open(
        cls,
        folder: str | Path,
        layers: Sequence[LayerRecord],
        options: Sequence[Scheme],
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> "WeightBank":
        """Open a bank that was built before, without the weights it was built from."""
        bank = cls(folder, layers, options, cache_bytes=cache_bytes)
        files = read_json(bank.folder / INDEX, version=BANK_VERSION)["layers"]
        missing = [name for name in bank.layers if name not in files]
        if missing:
            raise QuantDMError(f"bank {bank.folder}: no layer {missing[0]!r}; it was built for another denoiser")
        bank._files = {name: bank.folder / files[name] for name in bank.layers}
        return bank

    @property
    def calibrated(self) -> bool:
        """Whether an option is calibrated, so that `build` needs moments."""
        return any(scheme.calibration is not None for scheme in self.options)

    def _before(self) -> dict[str, Path]:
        """Return the files of the bank that was built here last."""
        if not (self.folder / INDEX).is_file():
            return {}
        files = read_json(self.folder / INDEX, version=BANK_VERSION)["layers"]
        return {name: self.folder / file for name, file in files.items()}

    def _open(self, name: str) -> dict[str, QuantizedWeight]:
        if name not in self._loaded:
            tensors, meta = load_tensors(self._file(name))
            shape, dtype = tuple(meta["shape"]), getattr(torch, meta["dtype"])
            self._loaded[name] = {
                scheme.label: QuantizedWeight.from_tensors(
                    scheme,
                    shape,
                    meta["split"],
                    dtype,
                    {k.split("/", 1)[1]: v for k, v in tensors.items() if k.split("/", 1)[0] == scheme.label},
                )
                for scheme in self.options
                if f"{scheme.label}/codes" in tensors or f"{scheme.label}/codes.0" in tensors
            }
        return self._loaded[name]

    def _file(self, name: str) -> Path:
        if name not in self._files:
            raise QuantDMError(f"bank: no layer {name!r} in {self.folder}; build the bank first")
        return self._files[name]

    def _told(self, name: str) -> dict[str, Any]:
        if name not in self._metadata:
            with open_tensors(self._file(name)) as file:  # of its tensors none is opened
                self._metadata[name] = metadata_of(file)
        return self._metadata[name]

    def get(self, layer_name: str, scheme: Scheme) -> QuantizedWeight:
        """Return one layer under one scheme, memory-mapped."""
        options = self._open(layer_name)
        if scheme.label not in options:
            raise QuantDMError(f"bank: {layer_name} has no option {scheme.label}; the bank holds {', '.join(options)}")
        return options[scheme.label]

    def other(self, parameter_name: str) -> None:
        """Say what a parameter that is not quantized becomes: it stays."""

    def weight_error(self, name: str, scheme: Scheme) -> float:
        """Return mean|w - ŵ|^2.4 / mean|w|^2.4 of one layer under one scheme."""
        return self._told(name)["errors"][scheme.label]

    def dense(self, name: str, scheme: Scheme, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the decoded weight on a device; decoded there, and kept as long as `cache_bytes` allow."""
        key = (name, scheme, dtype, torch.device(device))
        if key in self._dense:
            self._dense.move_to_end(key)
            return self._dense[key]
        weight = self.get(name, scheme).to(torch.device(device)).dequantize(dtype=dtype)
        if dtype.itemsize * self._num_weights <= self.cache_bytes:
            self._dense[key] = weight
            self._dense_bytes += weight.nbytes
            while self._dense_bytes > self.cache_bytes:
                self._dense_bytes -= self._dense.popitem(last=False)[1].nbytes
        return weight

    def room_beside(self, denoiser: nn.Module) -> int:
        """Return how many bytes of decoded weights are held beside a denoiser's own.

        `cache_bytes` on a processor, where a process may be one of several; on a CUDA device half of its free memory.
        """
        device = next(denoiser.parameters()).device
        return max(self.cache_bytes, free_bytes(device) // 2)

    @contextmanager
    def applied(
        self, denoiser: nn.Module, config: Mapping[str, Scheme | None], *, room: float | None = None
    ) -> Iterator[nn.Module]:
        """Give the denoiser the bank's weights while the context is open.

        What `room` bytes (None: `room_beside` it) do not hold is decoded whenever it is read; else only pointers move.
        """
        quantized = ((name, scheme) for name, scheme in config.items() if scheme is not None)
        with pointed(denoiser, room=self.room_beside(denoiser) if room is None else room) as point:
            for name, scheme in quantized:
                point(f"{name}.weight", lambda dtype, device, n=name, s=scheme: self.dense(n, s, dtype, device))
            yield denoiser


class _Work:
    """Layers that are built side by side in processes, or one by one in this one."""

    def __init__(
        self,
        bank: WeightBank,
        read: Callable[[str], torch.Tensor],
        moments: Mapping[str, Moments] | None,
        workers: int,
    ) -> None:
        self.bank, self.read, self.moments = bank, read, moments if bank.calibrated else None
        self._before, self._gate, self._here = bank._before(), Gate(IN_FLIGHT), Lock()
        self._processes, self._pool = LayerProcesses(), ThreadPoolExecutor(workers)
        sizes = ((layer.num_weights, bank.options) for layer in bank.layers.values())
        self._in_processes = workers > 1 and worth_processes(sizes, bank.sweeps)

    def __enter__(self) -> "_Work":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)  # first: nobody begins another layer
        self._processes.end()
        self._pool.shutdown()

    def all(self, layers: Sequence[LayerRecord]) -> Iterator[tuple[LayerRecord, Path]]:
        """Yield every layer and its file as they are done."""
        for future in as_completed([self._pool.submit(self._one, layer) for layer in layers]):
            yield future.result()

    def _one(self, layer: LayerRecord) -> tuple[LayerRecord, Path]:
        with self._gate.room(room_of(layer.shape, self.bank.options, layer.split)):
            weight = self.read(f"{layer.name}.weight").cpu()  # every core takes a layer; there are fewer accelerators
            if tuple(weight.shape) != layer.shape:
                raise QuantDMError(f"{layer.name}: got a weight {tuple(weight.shape)}, expected {layer.shape}")
            moments = None if self.moments is None else self.moments[layer.name]
            before = self._before.get(layer.name)
            task = LayerBuild(self.bank.folder, layer.name, layer.split, self.bank.options, self.bank.sweeps, before)
            file = None if moments is None else file_of(self.moments, layer.name)
            if self._in_processes and (moments is None or file is not None):
                found = task.look(weight, moments)  # what is there needs no process
                if moments is not None:
                    moments.let_go()
                if isinstance(found, Path):
                    return layer, found
                return layer, self._processes.build(task, found, weight, file)
            with self._here:
                return layer, task.build(weight, moments)
