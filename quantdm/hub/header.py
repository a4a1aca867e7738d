"""What the header of a safetensors file says of an export: its layers, and the checksums of all bytes."""

import base64
import binascii
import json
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from quantdm.errors import QuantDMError, reason_of
from quantdm.hub.config import EXPORT_VERSION
from quantdm.modules.packed import packed_layers
from quantdm.pipelines.stored import HEADER_KEY, SUFFIX, read_header
from quantdm.schemes import Scheme

AGAIN = "the file is damaged, copy or export it again"

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}


@dataclass(frozen=True)
class LayerEntry:
    """What the bytes of one packed layer mean."""

    scheme: Scheme
    shape: tuple[int, ...]
    split: int | None
    dtype: torch.dtype  # of the weight before quantization


Table = Mapping[str, LayerEntry]


@dataclass(frozen=True)
class Header:
    """What the header says: the layers and the checksums of the tensors."""

    table: dict[str, LayerEntry]
    packed: dict[str, int]  # layer -> checksum of its packed bytes
    others: tuple[int, ...]  # checksums of the other tensors in the order of their names; empty: they have none


class _Record(BaseModel):
    """The header as JSON, small beside a small model: layer -> [index of scheme, index of dtype, shape, seams].

    Checksums are base64 of 4 bytes each, little end first: `packed` of the layers in their order, `others` of the other
    tensors by name; `crc32` is that of all else in the record.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    version: int
    schemes: list[str]
    dtypes: list[str]
    layers: dict[str, tuple[int, int, list[int], list[int]]]
    packed: str
    others: str
    crc32: int


def layer_table(denoiser: nn.Module) -> dict[str, LayerEntry]:
    """Return the table of a model with packed layers."""
    return {
        name: LayerEntry(layer.scheme, layer.weight_shape, layer.split, layer.original_dtype)
        for name, layer in packed_layers(denoiser).items()
    }


def checksum(name: str, tensor: torch.Tensor) -> int:
    """Return the CRC-32 of a tensor's name, dtype, shape and bytes (0.45 ns per byte on one core).

    Raises:
        QuantDMError: the tensor is offloaded (on the meta device).
    """
    if tensor.is_meta:
        raise QuantDMError(f"{name}: is offloaded and cannot be saved; load the model without a device map first")
    what = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, what)


def pack_checksums(values: Sequence[int]) -> str:
    """Return checksums as base64."""
    return base64.b64encode(struct.pack(f"<{len(values)}I", *values)).decode()


def unpack_checksums(text: str) -> tuple[int, ...]:
    """Return the checksums that `pack_checksums` wrote.

    Raises:
        ValueError: not base64 of 4 bytes each.
    """
    try:
        data = base64.b64decode(text, validate=True)
        return struct.unpack(f"<{len(data) // 4}I", data)
    except (binascii.Error, struct.error) as error:
        raise ValueError(f"checksums: {error}") from None


def _record_checksum(record: Mapping[str, Any]) -> int:
    rest = {key: value for key, value in record.items() if key != "crc32"}
    return zlib.crc32(json.dumps(rest, separators=(",", ":")).encode())


def encode_header(table: Table, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return as compact JSON what the header says of these tensors (the packed ones, and others that get checksums)."""
    packed = [f"{name}{SUFFIX}" for name in table]
    others = sorted(tensors.keys() - set(packed))
    sums = ([checksum(key, tensors[key]) for key in keys] for keys in (packed, others))
    return header_text(table, *sums)


def header_text(
    table: Table, packed: Sequence[int], others: Sequence[int], *, longest_of: Sequence[Scheme] | None = None
) -> str:
    """Return the header of a table and the checksums of its tensors; its length depends on their number only.

    With `longest_of` it is the longest one that these layers can have under those schemes.
    """
    schemes = list(dict.fromkeys(entry.scheme.label for entry in table.values()))
    if longest_of is not None:
        schemes = [scheme.label for scheme in longest_of]
    dtypes = list(dict.fromkeys(str(entry.dtype).removeprefix("torch.") for entry in table.values()))
    layers = {
        name: (
            schemes.index(entry.scheme.label) if longest_of is None else len(schemes) - 1,
            dtypes.index(str(entry.dtype).removeprefix("torch.")),
            list(entry.shape),
            [] if entry.split is None else [entry.split],
        )
        for name, entry in table.items()
    }
    record = {
        "version": EXPORT_VERSION,
        "schemes": schemes,
        "dtypes": dtypes,
        "layers": layers,
        "packed": pack_checksums(packed),
        "others": pack_checksums(others),
    }
    total = _record_checksum(record)
    # As many blanks behind it as the number has digits less than the longest: the size of a file is known beforehand.
    blanks = " " * (len(str(2**32 - 1)) - len(str(total)))
    return json.dumps(record | {"crc32": total}, separators=(",", ":")) + blanks


def decode_header(text: str, where: str) -> Header:
    """Read what the header says; `where` names its file in messages.

    Raises:
        QuantDMError: not such a record, another version, an unknown scheme or dtype, or not what was written.
    """
    try:
        raw: Any = json.loads(text)
        if isinstance(raw, dict) and raw.get("version") != EXPORT_VERSION:
            raise QuantDMError(
                f"{where}: got version {raw.get('version')!r} of the layer table, expected {EXPORT_VERSION}; it was "
                "written by another quantdm"
            )
        record = _Record.model_validate_json(text)
        packed, others = unpack_checksums(record.packed), unpack_checksums(record.others)
        if len(packed) != len(record.layers):
            raise ValueError(f"{len(packed)} checksums for {len(record.layers)} layers")
    except QuantDMError:
        raise
    except (ValidationError, ValueError, RecursionError) as error:
        reason = reason_of(error) if isinstance(error, ValidationError) else str(error)
        raise QuantDMError(f"{where}: the layer table in its header is damaged ({reason}); export it again") from None
    if record.crc32 != _record_checksum(raw):
        raise QuantDMError(f"{where}: the layer table in its header is not the one that was saved; {AGAIN}")
    unknown = [dtype for dtype in record.dtypes if dtype not in _DTYPES]
    if unknown:
        raise QuantDMError(f"{where}: layer table: got dtype {unknown[0]!r}, expected one of {', '.join(_DTYPES)}")
    schemes = [Scheme.parse(label) for label in record.schemes]
    table = {}
    for name, (scheme, dtype, shape, seams) in record.layers.items():
        if not (0 <= scheme < len(schemes) and 0 <= dtype < len(record.dtypes)):
            raise QuantDMError(
                f"{where}: layer {name}: got scheme {scheme} and dtype {dtype}, which the table does not list"
            )
        if len(shape) < 2 or len(seams) > 1 or any(not 0 < seam < shape[1] for seam in seams):
            raise QuantDMError(
                f"{where}: layer {name}: got seams {seams} in the weight {shape}, expected one inside or none"
            )
        split = seams[0] if seams else None
        table[name] = LayerEntry(schemes[scheme], tuple(shape), split, _DTYPES[record.dtypes[dtype]])
    return Header(table, dict(zip(table, packed, strict=True)), others)


def read_headers(files: Iterable[str | Path]) -> tuple[Header, dict[str, Path]]:
    """Read what the headers of a checkpoint's files say, and which tensor lies in which file.

    Raises:
        QuantDMError: a file is damaged or not safetensors, has no layer table, or another one than the first file.
    """
    found_text, places = None, {}
    files = [Path(file) for file in files]
    for path in files:
        metadata, keys = read_header(path)
        text = metadata.get(HEADER_KEY)
        if text is None:
            raise QuantDMError(
                f"{path}: config.json says that quantdm quantized it, but its header has no layer table; it was "
                "rewritten by a tool that drops the header, or is another model's (all variants in a folder share its "
                "config.json): export it again"
            )
        if found_text not in (None, text):
            raise QuantDMError(f"{path}: its layer table differs from that of {files[0].name}; export it again")
        found_text = text
        twice = sorted(places.keys() & keys)
        if twice:
            raise QuantDMError(f"{path}: {twice[0]} lies in {places[twice[0]].name} too; export it again")
        places |= dict.fromkeys(keys, path)
    if found_text is None:
        raise QuantDMError("checkpoint: has no files; export it again")
    return decode_header(found_text, str(files[0])), places
