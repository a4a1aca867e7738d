"""Claims: which process measures what, on a file system that several processes and machines may share.

A claim is a file that is created exclusively, so only one process has it; its holder touches it again and again. One
that was not touched for a lease is stale and is taken over by creating, exclusively again, the file of the next
generation; the highest generation counts. Ages are differences of times that the file system itself stamps, so no clock
has to be right. A claim decides who works, not what is true: two holders would measure the same figures twice.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from quantdm.errors import QuantDMError

CLAIMS = ".claims"  # the folder of claims beside what is claimed
LEASE = 60.0  # seconds without a sign of life after which a claim is stale
BEATS = 6  # signs of life in a lease
NEXT = "~"  # between a key and the number of its generation


@dataclass(frozen=True)
class Claim:
    """Who has claimed a key, and how many seconds ago the last sign of life was."""

    key: str
    host: str
    space: str  # of process numbers: containers of one host name have their own
    pid: int
    started: str  # of the process, as the system tells it: process numbers come back
    age: float
    generation: int


class Claims:
    """The claims of this process in a folder; leaving the context gives all of them back."""

    def __init__(self, folder: str | Path, *, lease: float = LEASE) -> None:
        self.folder = Path(folder)
        self.lease = lease
        self._held: dict[str, int] = {}  # key -> generation
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Claims":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        self._over.clear()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        for key in list(self._held):
            self.release(key)

    def take(self, key: str) -> bool:
        """Claim a key; False if another living process has it.

        Raises:
            QuantDMError: the folder cannot be written.
        """
        if self._over.is_set():  # given back already: nobody would show signs of life
            return False
        holder = self.holder(key)
        if holder is not None and not self.is_stale(holder):
            return False
        generation = 0 if holder is None else holder.generation + 1
        own = {"host": socket.gethostname(), "space": _space(), "pid": os.getpid()}
        own["started"] = _started(os.getpid())
        path = self._path(key, generation)
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(own, file)
        except OSError as error:  # a full disk: an empty claim would keep others away for a lease
            path.unlink(missing_ok=True)
            raise self._unwritable(error) from error
        with self._lock:
            self._held[key] = generation
        return True

    def _unwritable(self, error: OSError) -> QuantDMError:
        return QuantDMError(f"{self.folder}: cannot be written ({error.strerror}); make room and give permission")

    def release(self, key: str) -> None:
        """Give a claim back; one that is not held here is left alone."""
        with self._lock:
            own = self._held.pop(key, None)
        if own is None:
            return
        for generation in range(own + 1):  # the highest, which counts, last
            with contextlib.suppress(OSError):
                self._path(key, generation).unlink()

    def holder(self, key: str) -> Claim | None:
        """Return who has claimed a key, or None."""
        generations = [int(name.partition(NEXT)[2] or 0) for name in self._names() if name.partition(NEXT)[0] == key]
        return self._read(key, max(generations)) if generations else None

    def holders(self) -> list[Claim]:
        """Return all claims, the longest without a sign of life last."""
        keys = dict.fromkeys(name.partition(NEXT)[0] for name in self._names())
        found = [claim for claim in map(self.holder, keys) if claim is not None]
        return sorted(found, key=lambda claim: claim.age)

    def living(self) -> list[Claim]:
        """Return the claims whose holders show signs of life."""
        return [claim for claim in self.holders() if not self.is_stale(claim)]

    def _names(self) -> list[str]:
        try:
            return [name for name in os.listdir(self.folder) if not name.startswith(".")]
        except FileNotFoundError:
            return []

    def _read(self, key: str, generation: int) -> Claim | None:
        path = self._path(key, generation)
        try:
            age = self._now() - path.stat().st_mtime
            record: Any = json.loads(path.read_text(encoding="utf-8") or "{}")
        except FileNotFoundError:
            return None
        except ValueError:
            record = {}  # being written, or torn: its age decides
        return Claim(
            key,
            host=record.get("host", ""),
            space=record.get("space", ""),
            pid=record.get("pid", 0),
            started=record.get("started", ""),
            age=age,
            generation=generation,
        )

    def is_stale(self, claim: Claim) -> bool:
        """Tell whether its holder is gone: no sign of life for a lease, or a process of this machine that has ended."""
        if claim.age > self.lease:
            return True
        ours = claim.host == socket.gethostname() and claim.space == _space()
        return ours and bool(claim.pid) and _started(claim.pid) != claim.started

    def _beat(self) -> None:
        while not self._over.wait(self.lease / BEATS):
            with self._lock:
                held = dict(self._held)
            for key, generation in held.items():
                with contextlib.suppress(OSError):
                    os.utime(self._path(key, generation))

    def sweep(self, folder: Path, pattern: str) -> None:
        """Delete what processes that were killed have left half-written: nobody has touched it for a lease."""
        with contextlib.suppress(OSError):
            now = self._now()
            for path in folder.glob(pattern):
                if now - path.stat().st_mtime > self.lease:
                    path.unlink(missing_ok=True)

    def _now(self) -> float:
        """Return the time of the file system."""
        probe = self.folder / f".{uuid.uuid4().hex}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:  # one who may only read has to trust the own clock
            return time.time()
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)

    def _path(self, key: str, generation: int) -> Path:
        return self.folder / (f"{key}{NEXT}{generation}" if generation else key)


def _space() -> str:
    """Return the space of process numbers that this process lives in; "" where the system has but one."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return when a process of this machine started, in the system's own words; "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return _alive(pid)


def _alive(pid: int) -> str:
    """Return "alive" for a living process where the system does not tell its start."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "alive"
