"""Records on disk: JSON, YAML and safetensors, versioned, written to a temporary name and renamed."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from quantdm.errors import QuantDMError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, delete it on any failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, record: Any) -> None:
    """Write one JSON record atomically (NaN and infinity are refused: they are not JSON)."""
    write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path, *, version: int | None = None) -> Any:
    """Read one JSON record and check its `version`.

    Raises:
        QuantDMError: the file is missing, is not JSON, or has another version.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QuantDMError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise QuantDMError(f"{path}: not a JSON file ({error}); delete it and run the stage again") from None
    if version is not None and (not isinstance(record, dict) or record.get("version") != version):
        got = record.get("version") if isinstance(record, dict) else type(record).__name__
        raise QuantDMError(f"{path}: got version {got}, expected {version}; it was written by another quantdm")
    return record


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, Any] | None = None) -> None:
    """Write tensors atomically as safetensors; `metadata` travels as one JSON string in the header."""
    header = {"format": "pt", "quantdm": json.dumps(metadata or {}, allow_nan=False)}
    with atomic_path(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=header)


@contextmanager
def open_tensors(path: str | Path, *, remedy: str = "") -> Iterator[Any]:
    """Open a safetensors file, memory-mapped, for the time of the block; `remedy` says what to do with a bad one.

    Raises:
        QuantDMError: the file is missing or damaged.
    """
    then = f"; {remedy}" if remedy else ""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise QuantDMError(f"{path}: no such file{then}") from None
    except (SafetensorError, OSError) as error:
        raise QuantDMError(f"{path}: damaged or not a safetensors file ({error}){then}") from None


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a safetensors file (memory-mapped) and the metadata that `save_tensors` put into its header.

    Raises:
        QuantDMError: the file is missing or damaged.
    """
    with open_tensors(path) as file:
        header = file.metadata() or {}
        return {k: file.get_tensor(k) for k in file.keys()}, json.loads(header.get("quantdm", "{}"))  # noqa: SIM118


def digest(*parts: Any) -> str:
    """Return a 16-digit SHA-256 of JSON-serialisable parts and tensors, for content addresses."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            flat = part.detach().cpu().contiguous().reshape(-1)
            sha.update(f"{part.dtype}{tuple(part.shape)}".encode())
            sha.update(flat.view(torch.uint8).numpy().data)
        else:
            sha.update(json.dumps(part, sort_keys=True, allow_nan=False).encode())
    return sha.hexdigest()[:16]
