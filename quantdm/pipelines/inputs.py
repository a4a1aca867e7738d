"""What stands for an argument in a protocol: plain values, files, lists from files, drawn pictures."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from quantdm.errors import QuantDMError
from quantdm.files import open_tensors
from quantdm.pipelines.drawn import draw

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_DRAWN = 10_000


class _Source(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    key: ClassVar[str]  # of the path


class Stored(_Source):
    """A file or folder, with the hash of what it held when the protocol was read."""

    sha256: str | None = None

    def found(self) -> "Stored":
        """Return it with an absolute path and its hash; what has a hash was read before and stays as it is.

        Raises:
            QuantDMError: it is missing or cannot be read.
        """
        if self.sha256 is not None:
            return self
        path = os.path.abspath(os.path.expanduser(getattr(self, self.key)))
        return self.model_copy(update={self.key: path, "sha256": self.hash_of(Path(path))})

    def hash_of(self, path: Path) -> str:
        """Return the hash of the file."""
        return hashlib.sha256(_bytes(path)).hexdigest()[:16]

    def check(self) -> None:
        """Check that the file is there and is what was read.

        Raises:
            QuantDMError: missing, unreadable, or changed.
        """
        path = Path(getattr(self, self.key))
        if self.hash_of(path) != self.sha256:
            raise QuantDMError(f"{path}: was changed since the protocol was read; put it back, or read it again")

    def open(self, size: tuple[int, int], fit: bool) -> Any:
        """Return what the pipeline is given: pictures scaled and cropped to `size` if they are to `fit`."""
        raise NotImplementedError


class Picture(Stored):
    """One picture file, as RGB."""

    key = "image"
    image: StrictStr

    def open(self, size: tuple[int, int], fit: bool) -> Any:
        """Return the picture."""
        return open_picture(Path(self.image), size if fit else None)


class Clip(Stored):
    """A folder whose pictures, by name, are the frames of one video."""

    key = "frames"
    frames: StrictStr

    def hash_of(self, path: Path) -> str:
        """Return the hash of all frames."""
        return hashlib.sha256(b"".join(_bytes(frame) for frame in pictures_in(path))).hexdigest()[:16]

    def open(self, size: tuple[int, int], fit: bool) -> Any:
        """Return the frames as a list of pictures."""
        return [open_picture(frame, size if fit else None) for frame in pictures_in(Path(self.frames))]


class TensorFile(Stored):
    """One tensor of a safetensors file, as it is."""

    key = "tensor"
    tensor: StrictStr
    name: StrictStr

    def open(self, size: tuple[int, int], fit: bool) -> Any:
        """Return the tensor."""
        with open_tensors(self.tensor) as file:
            if self.name not in file.keys():  # noqa: SIM118
                raise QuantDMError(f"{self.tensor}: holds no tensor {self.name!r}, expected one of {list(file.keys())}")
            return file.get_tensor(self.name)


class Drawn(_Source):
    """A picture made by a function of its number (see drawn.py); size: of the images that are made, unless given."""

    drawn: Literal["scene", "mask", "edges", "clip"]
    number: int = Field(0, ge=0, strict=True)
    size: int | None = Field(None, ge=8, strict=True)

    def open(self, size: tuple[int, int], fit: bool) -> Any:
        """Return the picture, or the frames of a clip."""
        return draw(self.drawn, self.number, size if self.size is None else (self.size, self.size))


class Constant(_Source):
    """Any value as it is, a list too: the same for every image."""

    value: Any

    def open(self, size: tuple[int, int], fit: bool) -> Any:
        """Return the value."""
        return self.value


class Lines(_Source):
    """A text file: one value per line that is not empty."""

    lines: StrictStr


class JsonLines(_Source):
    """A file of one JSON record per line: its records, or what stands under `key` in each."""

    jsonl: StrictStr
    key: StrictStr | None = None


class Folder(_Source):
    """A folder of pictures: one per image, by name."""

    images: StrictStr


class DrawnMany(_Source):
    """`count` drawn pictures of numbers 0, 1, 2, ..."""

    drawn: Literal["scene", "mask", "edges", "clip"]
    count: int = Field(ge=1, le=MAX_DRAWN, strict=True)
    size: int | None = Field(None, ge=8, strict=True)


Plain = StrictBool | StrictInt | StrictFloat | StrictStr | None
File = Picture | Clip | TensorFile | Drawn | Constant
Value = Plain | File
Several = Lines | JsonLines | Folder | DrawnMany
Column = Value | Several | Annotated[tuple[Value, ...], Field(min_length=1)]

# Where paths stand in a protocol file.
PATH_KEYS = ("image", "frames", "tensor", "lines", "jsonl", "images")


def placed(data: Any, folder: Path) -> Any:
    """Return the data of a protocol file with the paths of its sources made absolute: they are relative to `folder`."""
    if isinstance(data, list):
        return [placed(item, folder) for item in data]
    if not isinstance(data, Mapping):
        return data
    # A source is a mapping of its path and little else; an argument called `image` in `call` or a row holds a mapping.
    others = {"sha256", "name", "key"}
    source = next((key for key in PATH_KEYS if isinstance(data.get(key), str) and not set(data) - {key} - others), None)
    if source is None:
        return {key: placed(item, folder) for key, item in data.items()}
    return {**data, source: str(folder / os.path.expanduser(data[source]))}


def resolve(column: Any, value: Callable[[Any], Any] | None = None) -> Any:
    """Return a column with its files found: a list source becomes the tuple of its values.

    Args:
        value: turns what a JSON record holds into a value.

    Raises:
        QuantDMError: a file is missing, or empty, or not what it should be.
    """
    if isinstance(column, Stored):
        return column.found()
    if isinstance(column, Lines):
        return _some([line.strip() for line in _text(column.lines).splitlines() if line.strip()], column.lines)
    if isinstance(column, JsonLines):
        return _some([(value or (lambda v: v))(record) for record in _records(column)], column.jsonl)
    if isinstance(column, Folder):
        return tuple(Picture(image=str(path)).found() for path in pictures_in(Path(os.path.abspath(column.images))))
    if isinstance(column, DrawnMany):
        return tuple(Drawn(drawn=column.drawn, number=i, size=column.size) for i in range(column.count))
    return tuple(resolve(item, value) for item in column) if isinstance(column, (tuple, list)) else column


def _some(found: list[Any], path: str) -> tuple[Any, ...]:
    if not found:
        raise QuantDMError(f"{path}: is empty, expected one value per line or more")
    return tuple(found)


def _records(source: JsonLines) -> list[Any]:
    found = []
    for number, line in enumerate(_text(source.jsonl).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{source.jsonl}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise QuantDMError(f"{where}: not JSON ({error})") from None
        if not isinstance(record, dict) or source.key not in (None, *record):
            asked = "a JSON record" if source.key is None else f"a JSON record with {source.key!r}"
            raise QuantDMError(f"{where}: got {line.strip():.60}, expected {asked}")
        record = placed(record, Path(source.jsonl).parent)
        found.append(record if source.key is None else record[source.key])
    return found


def _text(path: str) -> str:
    try:
        return _bytes(Path(path)).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise QuantDMError(f"{path}: is no text in UTF-8, expected one value per line") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise QuantDMError(f"{path}: cannot be read ({reason}); paths are relative to the protocol file") from None


def pictures_in(folder: Path) -> list[Path]:
    """Return the pictures of a folder by name.

    Raises:
        QuantDMError: no such folder, or no picture in it.
    """
    try:
        found = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise QuantDMError(f"{folder}: cannot be read ({reason}); expected a folder of pictures") from None
    if not found:
        raise QuantDMError(f"{folder}: holds no picture, expected files that end in {', '.join(PICTURES)}")
    return found


def open_picture(path: Path, size: tuple[int, int] | None = None) -> Any:
    """Return a picture as RGB, scaled and cropped around its centre to (width, height) if a size is given.

    Raises:
        QuantDMError: missing, or no picture.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            found = picture.convert("RGB")
            return found if size is None else ImageOps.fit(found, size, Image.Resampling.BICUBIC)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise QuantDMError(f"{path}: cannot be read as a picture ({error})") from None
