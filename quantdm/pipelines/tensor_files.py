"""Tensors where they lie in safetensors files: names, shapes and dtypes from the headers, values when asked for."""

import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantdm.errors import QuantDMError

LENGTH = 8  # bytes that say how long the header is
# The names of dtypes in a header, in the order in which safetensors lays the tensors out: the widest come first.
DTYPE_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is not in memory: `meta` has its shape and dtype, `read` makes it, anew on every call."""

    meta: torch.Tensor
    read: Callable[[], torch.Tensor]


def tensors_in(files: Iterable[Path]) -> dict[str, LazyTensor]:
    """Return the tensors of the files of one checkpoint by name; only headers are read.

    Raises:
        QuantDMError: a file is missing or damaged, or two hold a tensor of one name.
    """
    found: dict[str, LazyTensor] = {}
    for path in files:
        mine = _tensors_of(path)
        twice = sorted(found.keys() & mine.keys())
        if twice:
            raise QuantDMError(f"{path}: {twice[0]} lies in another file of the checkpoint too; name one of the files")
        found |= mine
    return found


def floats_are(files: Iterable[Path], dtype: torch.dtype) -> bool:
    """Tell whether all floating tensors of a checkpoint have this dtype, so that opening it in that one loses nothing.

    Raises:
        QuantDMError: a file is missing or damaged.
    """
    found = {t.meta.dtype for t in tensors_in(files).values() if t.meta.is_floating_point()}
    return found == {dtype}


def map_tensor(path: Path, name: str) -> tuple[torch.Tensor, dict[str, Any], Callable[[], object]]:
    """Return a tensor of a file of `save_tensors`, memory-mapped, with the file's metadata.

    The third that is returned lets go of the memory that reading the tensor took; it is read again when it is needed.

    Raises:
        QuantDMError: the file is missing or damaged, or has no such tensor.
    """
    with _reading(path):
        header, start, size = _header_of(path)
        metadata = json.loads(header.get("__metadata__", {}).get("quantdm", "{}"))
        meta = _tensor(path, start, header[name], size).meta
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        first = start + header[name]["data_offsets"][0]
        tensor = torch.frombuffer(mapped, dtype=meta.dtype, count=meta.numel(), offset=first).view(meta.shape)
    unused = getattr(mmap, "MADV_DONTNEED", None)  # not every system can be told
    return tensor, metadata, lambda: None if unused is None else mapped.madvise(unused)


def _tensors_of(path: Path) -> dict[str, LazyTensor]:
    with _reading(path):
        header, start, size = _header_of(path)
        header.pop("__metadata__", None)
        return {name: _tensor(path, start, entry, size) for name, entry in header.items()}


def _header_of(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header of a file, where its data start, and its size."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(LENGTH), "little")
        if length > size - LENGTH:
            raise ValueError("its header is cut off")
        return json.loads(file.read(length)), LENGTH + length, size


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Tell of what is wrong with a file."""
    try:
        yield
    except FileNotFoundError:
        raise QuantDMError(f"{path}: no such file; copy or download it again") from None
    except OSError as error:
        raise QuantDMError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise QuantDMError(f"{path}: damaged or not a safetensors file ({error}); copy or download it again") from None


def _tensor(path: Path, start: int, entry: Mapping[str, Any], size: int) -> LazyTensor:
    first, last = entry["data_offsets"]
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"it has tensors of the unknown dtype {entry['dtype']}")
    meta = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")
    if last - first != meta.nbytes or start + last > size:
        raise ValueError("it is cut off, or its header is not its own")
    return LazyTensor(meta, lambda: _read(path, start + first, meta))


def _read(path: Path, first: int, meta: torch.Tensor) -> torch.Tensor:
    """Read into memory of its own, not a map of the file: pages of a map count as the process's until it is closed."""
    data = torch.empty(meta.nbytes, dtype=torch.uint8)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(first)
            rest = memoryview(data.numpy().data)
            while len(rest):  # one call reads 2 GB at most
                count = file.readinto(rest)
                if not count:
                    raise QuantDMError(f"{path}: was cut off while it was read; copy or download it again")
                rest = rest[count:]
    except OSError as error:
        raise QuantDMError(f"{path}: cannot be read ({error.strerror})") from None
    return data.view(meta.dtype).view(meta.shape)
