"""Read pickle files that others published, if they hold nothing but plain containers, text and numbers.

This is the one place of quantdm that reads pickles. It never writes them (its own records are JSON, YAML and
safetensors), and it is no way to load anything else: what names a class or function is refused before it is looked up.
"""

import io
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any, NoReturn

from quantdm.errors import QuantDMError

MAX_BYTES = 2**27
MAX_VALUES = 20_000_000
MAX_DEPTH = 8
_CONTAINERS = "expected only dicts, lists, tuples, text and numbers"


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that knows no class and no function, so that there is nothing it could call."""

    def find_class(self, module: str, name: str) -> NoReturn:
        """Refuse by name whatever the file asks for."""
        raise QuantDMError(f"asks for {module}.{name}, {_CONTAINERS}; nothing was executed. Do not trust this file")

    def persistent_load(self, pid: Any) -> NoReturn:
        """Refuse references to objects outside the file."""
        raise QuantDMError(f"refers to an object outside the file ({pid!r:.60}), {_CONTAINERS}")


def read_plain_pickle(path: str | Path) -> Any:
    """Return the plain data of a pickle file.

    Raises:
        QuantDMError: no such file, too big, damaged, or it holds anything but plain data; what it asks for is named.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise QuantDMError(f"{path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise QuantDMError(f"{path}: has {path.stat().st_size:,} bytes, expected {MAX_BYTES:,} or less")
    try:
        data = path.read_bytes()
        _check_memo(data)
        return _plain(_PlainUnpickler(io.BytesIO(data), encoding="utf-8").load())
    except QuantDMError as error:
        raise QuantDMError(f"{path}: {error}") from None
    except (Exception, MemoryError) as error:  # damaged pickles raise whatever their opcodes run into
        raise QuantDMError(
            f"{path}: no readable pickle ({type(error).__name__}: {error!s:.80}); fetch it again"
        ) from None


def _check_memo(data: bytes) -> None:
    """Refuse memo positions that no pickler writes: the C unpickler would allocate memory for all below them."""
    for position, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > position:
            raise QuantDMError(f"memo position {argument} behind {position} operations; the file is damaged or hostile")


def _plain(root: Any) -> Any:
    """Return a copy of plain data, every value counted: shared references could otherwise grow without end."""
    values = 0

    def copy(value: Any, depth: int) -> Any:
        nonlocal values
        values += 1
        if values > MAX_VALUES or depth > MAX_DEPTH:
            raise QuantDMError(f"has more than {MAX_VALUES:,} values or is nested deeper than {MAX_DEPTH}")
        if type(value) is dict:
            return {copy(key, depth + 1): copy(item, depth + 1) for key, item in value.items()}
        if type(value) in (list, tuple):
            return [copy(item, depth + 1) for item in value]
        if value is None or type(value) in (str, int, float, bool):
            return value
        raise QuantDMError(f"holds a {type(value).__name__}, {_CONTAINERS}")

    return copy(root, 0)
