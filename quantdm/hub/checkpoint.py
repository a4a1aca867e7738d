"""What the header of a safetensors file says of an export: its layers, and the checksums of all bytes."""

import base64
import binascii
import json
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from torch import nn

from quantdm.denoisers.stored import HEADER_KEY, SUFFIX, read_header
from quantdm.errors import QuantDMError
from quantdm.hub.config import EXPORT_VERSION
from quantdm.modules.blob import blob_size
from quantdm.modules.layers import PackedLayer, new_packed_layer, packed_layers, set_layer_
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
    schemes = list(dict.fromkeys(entry.scheme.label for entry in table.values()))
    dtypes = list(dict.fromkeys(str(entry.dtype).removeprefix("torch.") for entry in table.values()))
    layers = {
        name: (
            schemes.index(entry.scheme.label),
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
        "packed": pack_checksums([checksum(key, tensors[key]) for key in packed]),
        "others": pack_checksums([checksum(key, tensors[key]) for key in sorted(tensors.keys() - set(packed))]),
    }
    return json.dumps(record | {"crc32": _record_checksum(record)}, separators=(",", ":"))


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
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
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
                "rewritten by a tool that drops the header, or is another model's: export it again"
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


def place_of(files: Sequence[str | Path]) -> str:
    """Return how messages call a checkpoint: its file, or the directory of several."""
    return str(files[0] if len(files) == 1 else Path(files[0]).parent)


def prepare_layers_(denoiser: nn.Module, table: Table, where: str, *, keep_in_fp32: Iterable[str] = ()) -> None:
    """Replace the layers of a skeleton (on the meta device) by packed layers that wait for their bytes.

    `where` names the checkpoint in messages.

    Raises:
        QuantDMError: the table has layers that the model has not, or other shapes; it names the first.
    """
    fp32 = set(keep_in_fp32)
    for name, entry in table.items():
        try:
            layer = denoiser.get_submodule(name)
        except AttributeError:
            raise QuantDMError(
                f"{where}: checkpoint is for another model: {type(denoiser).__name__} has no layer {name}"
            ) from None
        weight = getattr(layer, "weight", None)
        if isinstance(layer, PackedLayer) or not isinstance(weight, torch.Tensor) or tuple(weight.shape) != entry.shape:
            got = tuple(getattr(weight, "shape", ())) or type(layer).__name__
            raise QuantDMError(
                f"{where}: checkpoint is for another model: {name} has the shape {entry.shape} there and {got} in "
                f"{type(denoiser).__name__}"
            )
        packed = new_packed_layer(layer)
        size = blob_size(entry.shape, entry.scheme, entry.split)
        packed.describe_(
            entry.scheme,
            entry.shape,
            entry.split,
            entry.dtype,
            weight_dtype=torch.float32 if fp32 & set(name.split(".")) else weight.dtype,
            packed=torch.empty(size, dtype=torch.uint8, device=weight.device),
        )
        set_layer_(denoiser, name, packed)


def check_keys(expected: Iterable[str], loaded: Iterable[str], where: str) -> None:
    """Check that a checkpoint (called `where`) has exactly the tensors that the prepared model waits for.

    Raises:
        QuantDMError: names the first that are missing or that nothing asks for.
    """
    expected, loaded = set(expected), set(loaded)
    missing, extra = sorted(expected - loaded), sorted(loaded - expected)
    if missing or extra:
        parts = [f"{len(missing)} tensors are missing, first {', '.join(missing[:3])}"] if missing else []
        parts += [f"{len(extra)} tensors belong to no layer, first {', '.join(extra[:3])}"] if extra else []
        raise QuantDMError(f"{where}: checkpoint does not fit its layer table: {'; '.join(parts)}; export it again")


def check_sizes(denoiser: nn.Module, places: Mapping[str, Path]) -> None:
    """Check that the packed tensors in the files are as large as those of a prepared model, whatever their names are.

    Raises:
        QuantDMError: names the file and the first tensor that no layer expects.
    """
    expected = Counter(layer.packed.numel() for layer in packed_layers(denoiser).values())
    for path in dict.fromkeys(places.values()):
        with safe_open(path, framework="pt") as file:
            for key in sorted(key for key, place in places.items() if place == path and key.endswith(SUFFIX)):
                stored = file.get_slice(key)
                shape, dtype = stored.get_shape(), stored.get_dtype()
                if dtype != "U8" or len(shape) != 1 or not expected[shape[0]]:
                    raise QuantDMError(
                        f"{path}: {key}: got {dtype} {tuple(shape)}, expected the bytes of a layer; the checkpoint "
                        "does not fit its layer table: export it again"
                    )
                expected[shape[0]] -= 1


def expected_checksums(header: Header, keys: Iterable[str], where: str) -> dict[str, int]:
    """Return the checksum of every tensor of a prepared model whose tensors have these names.

    `where` names the checkpoint in messages.

    Raises:
        QuantDMError: the header has checksums for another number of tensors.
    """
    expected = {f"{name}{SUFFIX}": value for name, value in header.packed.items()}
    others = sorted(set(keys) - expected.keys())
    if len(others) != len(header.others):
        raise QuantDMError(
            f"{where}: checkpoint does not fit its layer table: got {len(others)} tensors that are not quantized, "
            f"expected {len(header.others)}; export it again"
        )
    return expected | dict(zip(others, header.others, strict=True))


def check_bytes(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, int], places: Mapping[str, Path | str]
) -> None:
    """Check that the tensors of a checkpoint are those that were saved; `places` names the file of each.

    Raises:
        QuantDMError: names the file and the first tensor whose name, dtype, shape or bytes have changed.
    """
    for name, tensor in tensors.items():
        if name in expected and checksum(name, tensor) != expected[name]:
            kind = f"the packed weight of layer {name.removesuffix(SUFFIX)}" if name.endswith(SUFFIX) else name
            raise QuantDMError(f"{places[name]}: {kind} is not what was saved (checksum); {AGAIN}")


def check_filled(denoiser: nn.Module) -> None:
    """Check that every tensor of a loaded model was in its checkpoint: diffusers only warns and leaves it empty.

    Raises:
        QuantDMError: names the first that is empty.
    """
    for name, tensor in denoiser.state_dict().items():
        owner = denoiser.get_submodule(name.rpartition(".")[0])
        if tensor.is_meta and not hasattr(owner, "_hf_hook"):  # offloaded by accelerate: it arrives when it is needed
            raise QuantDMError(f"{name}: was not in the checkpoint; copy or download it again")


def check_loaded(denoiser: nn.Module) -> None:
    """Check that a prepared model has all its tensors and that the packed ones are valid quantized weights.

    Raises:
        QuantDMError: names the first layer that is empty or damaged.
    """
    check_filled(denoiser)
    for name, layer in packed_layers(denoiser).items():
        if layer.packed.is_meta:
            continue
        for key, tensor in layer.quantized.tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise QuantDMError(f"{name}: its {key} has NaN or infinite values; {AGAIN}")
