"""The table of quantized layers in the header of a safetensors file."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from quantdm.errors import QuantDMError
from quantdm.hub.config import EXPORT_VERSION
from quantdm.modules.blob import blob_size
from quantdm.modules.layers import PackedLayer, new_packed_layer, packed_layers, set_layer_
from quantdm.schemes import Scheme

HEADER_KEY = "quantdm"
SUFFIX = ".packed"

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


class _Record(BaseModel):
    """The table as JSON: layer -> [index into schemes, index into dtypes, shape, seams]; small beside a small model."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: int
    schemes: list[str]
    dtypes: list[str]
    layers: dict[str, tuple[int, int, list[int], list[int]]]


def layer_table(denoiser: nn.Module) -> dict[str, LayerEntry]:
    """Return the table of a model with packed layers."""
    return {
        name: LayerEntry(layer.scheme, layer.weight_shape, layer.split, layer.original_dtype)
        for name, layer in packed_layers(denoiser).items()
    }


def encode_table(table: Table) -> str:
    """Return the table as compact JSON."""
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
    record = {"version": EXPORT_VERSION, "schemes": schemes, "dtypes": dtypes, "layers": layers}
    return json.dumps(record, separators=(",", ":"))


def decode_table(text: str, where: str) -> dict[str, LayerEntry]:
    """Read a table; `where` names its file in messages.

    Raises:
        QuantDMError: not such a table, another version, an unknown scheme or dtype.
    """
    try:
        raw: Any = json.loads(text)
        if isinstance(raw, dict) and raw.get("version") != EXPORT_VERSION:
            raise QuantDMError(
                f"{where}: got version {raw.get('version')!r} of the layer table, expected {EXPORT_VERSION}; it was "
                "written by another quantdm"
            )
        record = _Record.model_validate_json(text)
    except (ValidationError, json.JSONDecodeError, RecursionError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise QuantDMError(f"{where}: the layer table in its header is damaged ({reason}); export it again") from None
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
    return table


def read_headers(files: Iterable[str | Path]) -> tuple[dict[str, LayerEntry], list[str]]:
    """Read the layer table and the names of all tensors from the headers of a checkpoint's files.

    Raises:
        QuantDMError: a file is damaged or not safetensors, has no table, or another one than the first file.
    """
    table_text, keys = None, []
    files = [Path(file) for file in files]
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(HEADER_KEY)
                keys += list(file.keys())
        except (SafetensorError, OSError) as error:
            raise QuantDMError(f"{path}: damaged or not a safetensors file ({error}); export it again") from None
        if text is None:
            raise QuantDMError(
                f"{path}: config.json says that quantdm quantized it, but its header has no layer table; it was "
                "rewritten by a tool that drops the header, or is another model's: export it again"
            )
        if table_text not in (None, text):
            raise QuantDMError(f"{path}: its layer table differs from that of {files[0].name}; export it again")
        table_text = text
    if table_text is None:
        raise QuantDMError("checkpoint: has no files; export it again")
    return decode_table(table_text, str(files[0])), keys


def prepare_layers_(denoiser: nn.Module, table: Table, *, keep_in_fp32: Iterable[str] = ()) -> None:
    """Replace the layers of a skeleton (on the meta device) by packed layers that wait for their bytes.

    Raises:
        QuantDMError: the table has layers that the model has not, or other shapes; it names the first.
    """
    fp32 = set(keep_in_fp32)
    for name, entry in table.items():
        try:
            layer = denoiser.get_submodule(name)
        except AttributeError:
            raise QuantDMError(
                f"checkpoint is for another model: {type(denoiser).__name__} has no layer {name}"
            ) from None
        weight = getattr(layer, "weight", None)
        if isinstance(layer, PackedLayer) or not isinstance(weight, torch.Tensor) or tuple(weight.shape) != entry.shape:
            got = tuple(getattr(weight, "shape", ())) or type(layer).__name__
            raise QuantDMError(
                f"checkpoint is for another model: {name} has the shape {entry.shape} there and {got} in the model"
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


def check_keys(expected: Iterable[str], loaded: Iterable[str]) -> None:
    """Check that a checkpoint has exactly the tensors that the prepared model waits for.

    Raises:
        QuantDMError: names the first that are missing or that nothing asks for.
    """
    expected, loaded = set(expected), set(loaded)
    missing, extra = sorted(expected - loaded), sorted(loaded - expected)
    if missing or extra:
        parts = [f"{len(missing)} tensors are missing, first {', '.join(missing[:3])}"] if missing else []
        parts += [f"{len(extra)} tensors belong to no layer, first {', '.join(extra[:3])}"] if extra else []
        raise QuantDMError(f"checkpoint does not fit its layer table: {'; '.join(parts)}; export it again")


def check_loaded(denoiser: nn.Module) -> None:
    """Check that every packed layer has its bytes and that they are a valid quantized weight.

    Raises:
        QuantDMError: names the first layer that is empty or damaged.
    """
    for name, layer in packed_layers(denoiser).items():
        if layer.packed.is_meta:
            if hasattr(layer, "_hf_hook"):  # offloaded by accelerate: its bytes arrive when it runs
                continue
            raise QuantDMError(f"{name}: its packed weight was not in the checkpoint; export it again")
        for key, tensor in layer.quantized.tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise QuantDMError(
                    f"{name}: its {key} has NaN or infinite values; the file is damaged, export it again"
                )
