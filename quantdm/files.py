"""Records on disk: JSON, text and safetensors, written to a temporary name and renamed; what may be replaced.

torch is imported by what reads and writes tensors, not by what reads a record: it takes a second.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantdm.errors import QuantDMError

if TYPE_CHECKING:
    import torch

# How a text file says that it is as quantdm wrote it: a comment behind the text with the hash of all before it.
SEAL = "written by quantdm, sha256 "
YAML_COMMENT, MARKUP_COMMENT = ("# ", ""), ("<!-- ", " -->")


def check_output(path: str | Path, *, folder: bool = False) -> Path:
    """Check that a file (or a folder) can be written, leaving nothing behind; return its path behind all links.

    Raises:
        QuantDMError: a folder where a file is expected or the reverse, a file among the parents, no permission.
    """
    try:
        real = Path(os.path.realpath(path))
        _check_kind(path, real, folder)
        above = next(place for place in (real, *real.parents) if place.is_dir() or (place != real and place.exists()))
        if not above.is_dir():
            raise QuantDMError(
                f"{path}: {above} is no directory, so nothing can be written below it; choose another path"
            )
        if real.exists() and not os.access(real, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with tempfile.TemporaryFile(dir=above):  # permissions, quotas and read-only disks tell only those who try
            pass
    except QuantDMError:
        raise
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise _unwritable(path, error) from None
    return real


def _check_kind(path: str | Path, real: Path, folder: bool) -> None:
    if os.path.lexists(real) and not (real.is_dir() if folder else real.is_file()):
        kind = "a directory" if real.is_dir() else "a file" if real.is_file() else "no plain file"
        expected = "a directory" if folder else "a file"
        raise QuantDMError(f"{path}: is {kind}, expected {expected} or a new name; choose another path")


def check_replaceable(path: str | Path) -> None:
    """Check that a text file is not there, or is as quantdm wrote it: nobody's own work is replaced.

    Raises:
        QuantDMError: it was made or changed by others.
    """
    if os.path.lexists(path) and not is_sealed(path):
        raise QuantDMError(
            f"{path}: exists and is not as quantdm wrote it (made or changed by hand, or by an older quantdm); move it "
            "away or choose another path"
        )


def is_sealed(path: str | Path) -> bool:
    """Tell whether a text file is as `write_text` wrote it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    comments = (YAML_COMMENT, MARKUP_COMMENT)
    return any(text == _sealed(text[: text.rfind(comment[0])], comment) for comment in comments)


def _sealed(text: str, comment: tuple[str, str]) -> str:
    return f"{text}{comment[0]}{SEAL}{hashlib.sha256(text.encode()).hexdigest()}{comment[1]}\n"


def _unwritable(path: str | Path, error: Exception) -> QuantDMError:
    reason = getattr(error, "strerror", None) or str(error)
    return QuantDMError(f"{path}: cannot be written ({reason}); choose another path, or make room and give permission")


@contextmanager
def atomic_path(path: str | Path, *, durable: bool = True, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, delete it on any failure.

    Where it is not to `replace` anything, a file that has come there meanwhile stays.

    A link stays, what it points to is written. What is not `durable` survives whatever happens to processes; a power
    cut within seconds may tear it.

    Raises:
        QuantDMError: the file cannot be written.
    """
    try:
        real = Path(os.path.realpath(path))
        _check_kind(path, real, folder=False)  # a device or a pipe would be replaced too
    except (OSError, ValueError) as error:
        raise (error if isinstance(error, QuantDMError) else _unwritable(path, error)) from None
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{real.name[:200]}.", suffix=".tmp", dir=real.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            if durable:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, real) if replace else _put_once(temporary, real)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def _put_once(temporary: Path, real: Path) -> None:
    try:
        os.link(temporary, real)
    except FileExistsError:
        pass
    except OSError:  # a file system without links: the last one stays
        os.replace(temporary, real)


def replace_folder(made: Path, folder: Path) -> None:
    """Move a finished folder to `folder` (on the same disk); what was there goes only when the new one is in place.

    Raises:
        QuantDMError: it cannot be moved; the old folder is where it was.
    """
    try:
        if not folder.exists():
            made.rename(folder)
            return
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name[:200]}.", suffix=".old", dir=folder.parent))
        old = folder.rename(aside / folder.name)
        try:
            made.rename(folder)
        except BaseException:
            old.rename(folder)
            aside.rmdir()
            raise
        shutil.rmtree(aside)
    except OSError as error:
        raise _unwritable(folder, error) from error


def write_text(path: str | Path, text: str, comment: tuple[str, str]) -> None:
    """Write a text file atomically and seal it with a comment of its language; it replaces only what is sealed too.

    Raises:
        QuantDMError: the file cannot be written, or was made or changed by others.
    """
    check_replaceable(path)
    with atomic_path(path) as temporary:
        temporary.write_text(_sealed(text, comment), encoding="utf-8")


def write_json(path: str | Path, record: Any, *, durable: bool = True, replace: bool = True) -> None:
    """Write one JSON record atomically (NaN and infinity are refused: they are not JSON); see `atomic_path`.

    Raises:
        QuantDMError: the file cannot be written; the record has a version and would replace what has none.
    """
    if isinstance(record, dict) and "version" in record and os.path.lexists(path):
        found = read_json(path)
        if not isinstance(found, dict) or "version" not in found:
            raise QuantDMError(f"{path}: exists and is no record of quantdm; move it away or choose another path")
    with atomic_path(path, durable=durable, replace=replace) as temporary:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | Path, *, version: int | None = None) -> Any:
    """Read one JSON record and check its `version`.

    Raises:
        QuantDMError: the file is missing, is not JSON, or has another version.
    """
    data = read_bytes(path)
    if data is None:
        raise QuantDMError(f"{path}: no such file")
    return parse_json(data, path, version=version)


def read_bytes(path: str | Path) -> bytes | None:
    """Return what is in a file, by one look; None where there is none.

    Raises:
        QuantDMError: it cannot be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise QuantDMError(f"{path}: cannot be read ({error.strerror}); expected a JSON file") from None


def parse_json(data: bytes, path: str | Path, *, version: int | None = None) -> Any:
    """Return the JSON record that was read from `path`, its `version` checked.

    Raises:
        QuantDMError: it is not JSON, or has another version.
    """
    try:
        record = json.loads(data.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise QuantDMError(
            f"{path}: not a JSON file ({error}); put a whole one in its place, or move it away and run the stage again"
        ) from None
    if version is not None and (not isinstance(record, dict) or record.get("version") != version):
        got = record.get("version") if isinstance(record, dict) else type(record).__name__
        raise QuantDMError(f"{path}: got version {got}, expected {version}; it was written by another quantdm")
    return record


def save_tensors(
    path: str | Path, tensors: "dict[str, torch.Tensor]", metadata: dict[str, Any] | None = None, durable: bool = True
) -> None:
    """Write tensors atomically (see `atomic_path`) as safetensors; `metadata` travels as one JSON string in the header.

    Raises:
        QuantDMError: the file cannot be written, or would replace what is no such file of the same `kind`.
    """
    from safetensors.torch import save_file

    if os.path.lexists(path):
        with open_tensors(path, remedy="move it away or choose another path") as file:
            found = (file.metadata() or {}).get("quantdm")
        if found is None or json.loads(found).get("kind") != (metadata or {}).get("kind"):
            raise QuantDMError(f"{path}: exists and holds something else; move it away or choose another path")
    header = {"format": "pt", "quantdm": json.dumps(metadata or {}, allow_nan=False)}
    with atomic_path(path, durable=durable) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=header)


@contextmanager
def open_tensors(path: str | Path, *, remedy: str = "") -> Iterator[Any]:
    """Open a safetensors file, memory-mapped, for the time of the block; `remedy` says what to do with a bad one.

    Raises:
        QuantDMError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    then = f"; {remedy}" if remedy else ""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise QuantDMError(f"{path}: no such file{then}") from None
    except (SafetensorError, OSError) as error:
        raise QuantDMError(f"{path}: damaged or not a safetensors file ({error}){then}") from None


def load_tensors(path: str | Path) -> "tuple[dict[str, torch.Tensor], dict[str, Any]]":
    """Read a safetensors file (memory-mapped) and the metadata that `save_tensors` put into its header.

    Raises:
        QuantDMError: the file is missing or damaged.
    """
    with open_tensors(path) as file:
        return {k: file.get_tensor(k) for k in file.keys()}, metadata_of(file)  # noqa: SIM118


def metadata_of(file: Any) -> dict[str, Any]:
    """Return the metadata that `save_tensors` put into the header of a file that `open_tensors` opened."""
    return json.loads((file.metadata() or {}).get("quantdm", "{}"))


def tensors_digest(path: str | Path) -> str:
    """Return the hash of a safetensors file's tensors and metadata."""
    tensors, metadata = load_tensors(path)
    return digest(metadata, *[part for key in sorted(tensors) for part in (key, tensors[key])])


def digest(*parts: Any) -> str:
    """Return a 16-digit SHA-256 of JSON-serialisable parts and tensors, for content addresses."""
    sha = hashlib.sha256()
    for part in parts:
        if hasattr(part, "detach"):  # a tensor
            import torch

            flat = part.detach().cpu().contiguous().reshape(-1)
            sha.update(f"{part.dtype}{tuple(part.shape)}".encode())
            sha.update(flat.view(torch.uint8).numpy().data)
        else:
            sha.update(json.dumps(part, sort_keys=True, allow_nan=False).encode())
    return sha.hexdigest()[:16]
