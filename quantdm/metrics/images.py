"""Where images to be measured come from: folders, zip and tar archives, arrays and tensors in files."""

import hashlib
import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from quantdm.errors import QuantDMError
from quantdm.files import digest, load_tensors, read_json
from quantdm.metrics.manifest import MANIFEST, lacks_frames
from quantdm.pipelines.inputs import PICTURES

BATCH = 64
SCALED = "scaled and cropped"
_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


@dataclass(frozen=True)
class ImageSet:
    """Images as uint8 batches [n, C, H, W], in a fixed order."""

    source: str  # path or pipeline, for errors and names
    names: tuple[str, ...]
    batches: Callable[[], Iterator[torch.Tensor]]
    digest: Callable[[], str]  # of the content
    steps: int | None = None
    seeds: str | None = None
    prompts: tuple[str, ...] | None = None  # one per image, where it is known
    resized: str = ""  # what was done to them before any features: "256 px, ..."
    frames: int = 1  # of each video, which are images one after another

    def __len__(self) -> int:
        return len(self.names)


def open_images(path: str | Path, *, side: int | None = None, rgb: bool = False) -> ImageSet:
    """Open images: a folder (with all folders in it), .zip, .tar (.gz, .bz2, .xz), .npz or .safetensors.

    Args:
        path: arrays are uint8 [N, H, W, C] in the one array of an .npz (or `arr_0`), tensors `images` uint8
            [N, C, H, W].
        side: scale and crop every picture around its centre to side x side (PIL, bicubic); needed where pictures have
            several sizes.
        rgb: turn pictures of every mode (grey, palette, alpha) into RGB.

    Raises:
        QuantDMError: missing, empty, fewer than two images, or no such file. A picture that is corrupt, or of another
            size or mode than the first, is one when its turn comes; the message names the file.
    """
    path = Path(path).expanduser()
    name = path.name.lower()
    if path.is_dir():
        found = _of_folder(path, side, rgb)
    elif not path.is_file():
        raise QuantDMError(f"{path}: no such file or folder; expected images")
    elif name.endswith(".zip"):
        found = _of_archive(path, _Zip, side, rgb)
    elif name.endswith(_TAR):
        found = _of_archive(path, _Tar, side, rgb)
    elif name.endswith((".npz", ".safetensors")):
        found = _of_arrays(path, side)
    else:
        raise QuantDMError(
            f"{path}: expected a folder, .zip, .tar, .npz or .safetensors of images, or a pipeline (a folder with "
            "model_index.json)"
        )
    if len(found) < 2:
        raise QuantDMError(f"{path}: holds {len(found)} image, expected two or more: one has no distance to others")
    return found


def _told(side: int | None) -> str:
    return "" if side is None else f"{SCALED} to {side} px by PIL, bicubic"


# ------------------------------------------------------------------------------------------------- pictures in files


def _of_folder(folder: Path, side: int | None, rgb: bool) -> ImageSet:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
    if not files:
        raise QuantDMError(f"{folder}: holds no picture, expected files that end in {', '.join(PICTURES)}")
    names = tuple(str(p.relative_to(folder)) for p in files)
    told: dict[str, Any] = {}
    if (folder / MANIFEST).is_file():
        record = read_json(folder / MANIFEST)
        told = {"steps": record.get("steps"), "seeds": record.get("seeds")}
        if record.get("images", len(names)) != len(names):
            raise QuantDMError(
                f"{folder}: holds {len(names)} of the {record['images']} images that its manifest names; run "
                "`quantdm evaluate generate` again to make the rest"
            )
        if lacks_frames(record):
            raise QuantDMError(
                f"{folder}: its pictures are videos, and its manifest does not say of how many frames: an older "
                "quantdm made them; run `quantdm evaluate generate` again as then, which makes one anew and notes it"
            )
        if len(prompts := record.get("prompts") or ()) == len(names):
            told["prompts"] = tuple(str(p) for p in prompts)
        told["frames"] = record.get("frames", 1)
    found = ImageSet(
        str(folder), names, lambda: _read(((str(p), p.read_bytes) for p in files), side, rgb),
        lambda: _digest((n, p.read_bytes) for n, p in zip(names, files, strict=True)), resized=_told(side), **told,
    )  # fmt: skip
    if found.frames > 1 and side is not None:
        raise QuantDMError(f"{folder}: side: got {side}, but its pictures are videos; leave it out")
    if found.frames == 1:
        return found
    content = lambda: f"{found.digest()}, frames of {found.frames}"  # noqa: E731
    return replace(framed(found, found.frames), batches=lambda: _frames_of(found), digest=content)


def framed(videos: ImageSet, frames: int) -> ImageSet:
    """Return a set with one name and one prompt per frame instead of one per video."""
    stems = [name.rpartition(".")[0] or name for name in videos.names]
    names = tuple(f"{stem}-{frame:03d}" for stem in stems for frame in range(frames))
    prompts = None if videos.prompts is None else tuple(p for p in videos.prompts for _ in range(frames))
    return replace(videos, names=names, prompts=prompts, frames=frames)


def _frames_of(videos: ImageSet) -> Iterator[torch.Tensor]:
    """Yield the frames of pictures that hold the frames of a video below each other."""
    for stacks in videos.batches():
        if stacks.shape[2] % videos.frames:
            raise QuantDMError(
                f"{videos.source}: its pictures are {stacks.shape[2]} px high, expected {videos.frames} frames below "
                "each other, as its manifest says"
            )
        yield torch.cat([torch.stack(stack.chunk(videos.frames, dim=1)) for stack in stacks])


class _Zip:
    """A zip archive as names and readers."""

    def __init__(self, path: Path) -> None:
        self.file = zipfile.ZipFile(path)
        self.names = [i.filename for i in self.file.infolist() if not i.is_dir()]

    def read(self, name: str) -> bytes:
        return self.file.read(name)


class _Tar:
    """A tar archive as names and readers."""

    def __init__(self, path: Path) -> None:
        self.file = tarfile.open(path)  # noqa: SIM115 (closed by `_archive`)
        self.members = {m.name: m for m in self.file.getmembers() if m.isfile()}
        self.names = [*self.members]

    def read(self, name: str) -> bytes:
        stream = self.file.extractfile(self.members[name])
        assert stream is not None
        return stream.read()


@contextmanager
def _archive(path: Path, kind: Callable[[Path], Any]) -> Iterator[Any]:
    try:
        archive = kind(path)
    except (zipfile.BadZipFile, tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise QuantDMError(f"{path}: damaged or no such archive ({error})") from None
    try:
        yield archive
    finally:
        archive.file.close()


def _of_archive(path: Path, kind: Callable[[Path], Any], side: int | None, rgb: bool) -> ImageSet:
    with _archive(path, kind) as archive:
        names = tuple(sorted(n for n in archive.names if Path(n).suffix.lower() in PICTURES))
    if not names:
        raise QuantDMError(f"{path}: holds no picture, expected files that end in {', '.join(PICTURES)}")

    def batches() -> Iterator[torch.Tensor]:
        with _archive(path, kind) as archive:
            yield from _read(((f"{path}: {n}", lambda n=n: archive.read(n)) for n in names), side, rgb)

    return ImageSet(str(path), names, batches, lambda: _digest([(path.name, path.read_bytes)]), resized=_told(side))


def _digest(files: Any) -> str:
    sha = hashlib.sha256()
    for name, read in files:
        sha.update(name.encode())
        sha.update(hashlib.sha256(read()).digest())
    return sha.hexdigest()[:16]


def _read(files: Iterator[tuple[str, Callable[[], bytes]]], side: int | None, rgb: bool) -> Iterator[torch.Tensor]:
    """Yield batches of pictures, all of the mode and the size of the first."""
    first, batch = None, []
    for name, read in files:
        picture = _picture(name, read, side, rgb)
        kind = (picture.mode, picture.size)
        first = first or (name, kind)
        if picture.mode not in ("RGB", "L") or kind != first[1]:
            _refuse(name, kind, first)
        pixels = torch.from_numpy(np.array(picture))
        batch.append(pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None])
        if len(batch) == BATCH:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def _picture(name: str, read: Callable[[], bytes], side: int | None, rgb: bool) -> Image.Image:
    try:
        with Image.open(io.BytesIO(read())) as opened:
            found = opened.convert("RGB") if rgb else opened.copy()
            return found if side is None else ImageOps.fit(found, (side, side), Image.Resampling.BICUBIC)
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        zlib.error,
        zipfile.BadZipFile,
        Image.DecompressionBombError,
    ) as e:
        raise QuantDMError(f"{name}: cannot be read as a picture ({e}); replace it or take it away") from None


def _refuse(name: str, kind: tuple[str, Any], first: tuple[str, tuple[str, Any]]) -> None:
    (mode, (width, height)), (other, (other_width, other_height)) = kind, first[1]
    if mode not in ("RGB", "L") or mode != other:
        expected = "RGB or L (grey)" if name == first[0] else f"{other} as {Path(first[0]).name}"
        raise QuantDMError(f"{name}: has mode {mode}, expected {expected}; --rgb turns all pictures into RGB")
    raise QuantDMError(
        f"{name}: is {width} x {height}, but {Path(first[0]).name} {other_width} x {other_height}; expected one size: "
        "--side 256 scales and crops all pictures to that"
    )


# ----------------------------------------------------------------------------------------------------- arrays in files


def _of_arrays(path: Path, side: int | None) -> ImageSet:
    if side is not None:
        raise QuantDMError(f"{path}: side: got {side}, but arrays are taken as they are; leave it out")
    images = _array(path) if path.suffix.lower() == ".npz" else _tensor(path)
    if images.ndim != 4 or images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
        raise QuantDMError(
            f"{path}: got {images.dtype} {tuple(images.shape)}, expected bytes (uint8) with one channel or three: "
            "[N, H, W, C] in an .npz, [N, C, H, W] in a .safetensors"
        )
    names = tuple(f"{i:06d}" for i in range(len(images)))
    return ImageSet(str(path), names, lambda: iter(images.split(BATCH)), lambda: digest(images))


def _array(path: Path) -> torch.Tensor:
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = ["arr_0"] if "arr_0" in file.files else file.files
            if len(keys) != 1:
                raise QuantDMError(f"{path}: holds {', '.join(keys) or 'nothing'}; expected one array of images")
            array = np.ascontiguousarray(file[keys[0]])
    except QuantDMError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise QuantDMError(f"{path}: damaged or no .npz of numbers ({error})") from None
    found = torch.from_numpy(array)
    return found.movedim(-1, 1) if found.ndim == 4 else found


def _tensor(path: Path) -> torch.Tensor:
    tensors, _ = load_tensors(path)
    if "images" not in tensors:
        raise QuantDMError(f"{path}: holds {', '.join(tensors) or 'nothing'}; expected a tensor `images`")
    return tensors["images"]
