"""Safetensors files that are filled tensor by tensor, in any order; laid out as safetensors lays them out."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from quantdm.pipelines.tensor_files import DTYPE_NAMES, LENGTH

DATA_ALIGNMENT = 8  # bytes, of the data behind the header
_ORDER = {dtype: position for position, dtype in enumerate(DTYPE_NAMES)}


@dataclass(frozen=True)
class Layout:
    """Where the tensors of one file lie, counted from the end of its header."""

    offsets: dict[str, int]
    nbytes: int
    record: dict[str, object]

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """Return what stands before the data; its length depends on that of the metadata only."""
        text = json.dumps({"__metadata__": dict(metadata)} | self.record, ensure_ascii=False, separators=(",", ":"))
        data = text.encode()
        padded = data.ljust(-(-len(data) // DATA_ALIGNMENT) * DATA_ALIGNMENT)
        return len(padded).to_bytes(LENGTH, "little") + padded


def lay_out(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """Return where safetensors puts these tensors (which may be on the meta device)."""
    offsets, record, end = {}, {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (_ORDER[item[1].dtype], item[0])):
        first, end = end, end + tensor.nbytes
        offsets[name] = first
        shape = list(tensor.shape)
        record[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [first, end]}
    return Layout(offsets, end, record)


class Shards:
    """The files of one checkpoint, with room for all tensors; they can be read once `finish` has written the headers.

    Args:
        folder: where they are; files that are there already are filled on.
        tensors: name -> tensor on the meta device, in the order in which files are filled.
        pattern: of the files' names.
        shard_size: of one file at most, e.g. "10GB".
        metadata: of every file, as long as that which `finish` gets.

    Raises:
        OSError: no room on the disk.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, torch.Tensor],
        pattern: str,
        shard_size: str,
        metadata: Mapping[str, str],
    ) -> None:
        self.folder = folder
        split = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=pattern, max_shard_size=shard_size)
        self.is_sharded, self.metadata = split.is_sharded, split.metadata
        self.weight_map = {name: file for file, names in split.filename_to_tensors.items() for name in names}
        self._layouts = {
            file: lay_out({name: tensors[name] for name in names}) for file, names in split.filename_to_tensors.items()
        }
        self._start = {file: len(layout.header(metadata)) for file, layout in self._layouts.items()}
        self._nbytes = {name: tensor.nbytes for name, tensor in tensors.items()}
        self._files: dict[str, int] = {}
        for file, layout in self._layouts.items():
            self._files[file] = os.open(folder / file, os.O_RDWR | os.O_CREAT, 0o644)
            self._make_room(self._files[file], self._start[file] + layout.nbytes)

    @staticmethod
    def _make_room(file: int, size: int) -> None:
        """Take the room on the disk now: a full one is noticed before anything is computed."""
        os.ftruncate(file, size)
        if size and hasattr(os, "posix_fallocate"):
            with suppress(NotImplementedError):
                os.posix_fallocate(file, 0, size)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor into its place; from any thread."""
        file, place = self._place(name)
        rest = memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        while len(rest):
            count = os.pwrite(file, rest, place)
            rest, place = rest[count:], place + count

    def read(self, name: str, meta: torch.Tensor) -> torch.Tensor:
        """Return what stands in the place of a tensor of bytes."""
        file, place = self._place(name)
        data = os.pread(file, self._nbytes[name], place)
        return torch.frombuffer(bytearray(data), dtype=meta.dtype).view(meta.shape)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the headers and close the files."""
        for file, layout in self._layouts.items():
            header = layout.header(metadata)
            assert len(header) == self._start[file], "the header has outgrown its room"
            os.pwrite(self._files[file], header, 0)
        self.close()

    def close(self) -> None:
        """Close the files as they are."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _place(self, name: str) -> tuple[int, int]:
        file = self.weight_map[name]
        return self._files[file], self._start[file] + self._layouts[file].offsets[name]
