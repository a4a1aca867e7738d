"""Rewrite exports in tests, with or without new checksums."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quantdm.hub.header import _record_checksum, checksum, pack_checksums, unpack_checksums
from tests.hub_models import contents

Tensors = dict[str, torch.Tensor]


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def edit_file(path: Path, change: Callable[[dict[str, str], Tensors], object]) -> None:
    """Change the metadata and the tensors of a safetensors file in place."""
    header, tensors = contents(path)
    change(header, tensors)
    save_file(tensors, path, metadata=header)


def sign(header: dict[str, str], tensors: Tensors) -> None:
    """Give the header the checksums of these tensors, as far as it knows them: what is wrong now is no accident."""
    record = json.loads(header["quantdm"])
    old = unpack_checksums(record["packed"])
    keys = [f"{name}.packed" for name in record["layers"]]
    new = [checksum(key, tensors[key]) if key in tensors else value for key, value in zip(keys, old, strict=True)]
    record["packed"] = pack_checksums(new)
    record["crc32"] = _record_checksum(record)
    header["quantdm"] = json.dumps(record, separators=(",", ":"))
