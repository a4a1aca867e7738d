"""What a node of a cluster has of runs: every file once, by its content, and a folder of links to them for each worker.

A worker holds a lock on its folder as long as it lives, so whoever comes later, or cleans up behind a search, can tell
what is left of dead ones.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantdm.errors import QuantDMError

FILES, WORKERS = "files", "workers"
ALIVE, NEW = ".alive", ".new"  # in the folder of a worker: its lock, and what is being written
CHANGE, FETCH = ".lock", ".fetch"  # locks of a node: who changes what is there, who fetches
HERE = "made here"  # stands for the hash of what a worker made itself
DYING = 5.0  # seconds that a process which was killed may take to be gone
Files = dict[str, tuple[str, list[Any]]]  # name -> (hash of the content, [place in the object store])


@dataclass(frozen=True)
class Parcel:
    """What a worker has to have before it does something.

    The listing of the files that stay is a place in the object store, so that a job is small however many there are: a
    worker fetches it when its version is new to it. What is given with a job may replace what was given before.
    """

    version: str
    listing: list[Any]  # [place of Files]: in a list, since Ray would fetch what stands alone
    given: Files = field(default_factory=dict)


def node_folder() -> Path:
    """Return where this node keeps what workers of this user fetched.

    Raises:
        QuantDMError: it belongs to another user.
    """
    top = Path(tempfile.gettempdir()) / f"quantdm-{os.getuid()}"
    top.mkdir(mode=0o700, exist_ok=True)
    if top.is_symlink() or top.stat().st_uid != os.getuid():
        raise QuantDMError(f"{top}: belongs to another user; remove it, or set another TMPDIR on this node")
    return top


class Mirror:
    """The run directory of a driver, as far as one worker on this node needs it.

    Args:
        top: where this node keeps files; what is left there of dead workers is removed.
    """

    def __init__(self, top: Path) -> None:
        self._top, self._version = top, ""
        self._have: dict[str, str] = {}  # name -> hash
        sweep(top)
        with _locked(top, CHANGE):
            self.folder = Path(tempfile.mkdtemp(dir=top / WORKERS))
            self._alive = os.open(self.folder / ALIVE, os.O_CREAT | os.O_RDWR)  # as long as this process lives
            fcntl.flock(self._alive, fcntl.LOCK_EX)

    def take(self, parcel: Parcel, fetch: Callable[[Any], Any]) -> None:
        """Fetch what is new of a parcel.

        Raises:
            QuantDMError: a file that stays as it is has another content.
        """
        if parcel.version != self._version:
            for name, (sha, places) in fetch(parcel.listing[0]).items():
                if self._have.get(name, sha) not in (sha, HERE):
                    raise QuantDMError(f"{name}: changed while the search was running; start it again")
                if name not in self._have:
                    self._place(name, sha, lambda places=places: fetch(places[0]))
            self._version = parcel.version
        for name, (sha, places) in parcel.given.items():
            if self._have.get(name) != sha:
                self._place(name, sha, lambda places=places: fetch(places[0]))

    def made(self, below: str) -> dict[str, Path]:
        """Return name -> file of what was made here in a folder since it was asked last."""
        found = {f"{below}/{path.name}": path for path in (self.folder / below).glob("*.safetensors")}
        new = {name: path for name, path in found.items() if name not in self._have}
        self._have |= dict.fromkeys(new, HERE)
        return new

    def _place(self, name: str, sha: str, fetch: Callable[[], Any]) -> None:
        """Put a file into the folder; several workers of one node fetch it once."""
        kept, path = self._top / FILES / sha, self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self._top, FETCH):
            if not self._linked(kept, path):
                new = self.folder / NEW
                new.write_bytes(fetch())
                with _locked(self._top, CHANGE):
                    new.replace(path)
                    os.link(path, kept)
        self._have[name] = sha

    def _linked(self, kept: Path, path: Path) -> bool:
        with _locked(self._top, CHANGE):
            if kept.is_file():
                path.unlink(missing_ok=True)
                os.link(kept, path)
            return kept.is_file()


def sweep(top: Path, gone: Collection[str] = ()) -> None:
    """Remove the folders of dead workers, and the files that no living one has.

    Args:
        top: where the node keeps them.
        gone: names of folders whose workers were killed just now: they are waited for.
    """
    end = time.monotonic() + DYING
    while True:
        with _locked(top, CHANGE):
            for folder in (top / WORKERS).iterdir():
                if not _held(folder):
                    shutil.rmtree(folder, ignore_errors=True)
            for file in (top / FILES).iterdir():
                if file.stat().st_nlink == 1:
                    file.unlink()
        if time.monotonic() > end or not any((top / WORKERS / name).exists() for name in gone):
            return
        time.sleep(0.05)


def sweep_here(gone: Collection[str]) -> None:
    """Clean this node up behind workers that were killed."""
    sweep(node_folder(), gone)


def _held(folder: Path) -> bool:
    try:
        with (folder / ALIVE).open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # it died before it had a lock
        return False
    return False


@contextmanager
def _locked(top: Path, name: str) -> Iterator[None]:
    for below in (FILES, WORKERS):
        (top / below).mkdir(parents=True, exist_ok=True)
    with (top / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
