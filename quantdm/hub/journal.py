"""Which layers of an export are finished: a file that grows beside it, so that one that was killed goes on."""

import fcntl
import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from quantdm.errors import QuantDMError

FILE = "finished.jsonl"
SUFFIX = ".partial"


class Workplace:
    """A folder beside an export that is being written; locked while a process works there.

    Args:
        place: where the export will be.
        key: hash of what is being made: another recipe or source has another folder.

    Raises:
        QuantDMError: another process is writing just this export.
    """

    def __init__(self, place: Path, key: str) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        self.place = place
        self.folder = place.parent / f"{_prefix(place)}{key}{SUFFIX}"
        self.folder.mkdir(exist_ok=True)
        self._file = (self.folder / FILE).open("a+", encoding="utf-8")
        if not _locked(self._file.fileno()):
            self._file.close()
            raise QuantDMError(f"export: another process is writing {place}; wait for it, or choose another directory")
        self._lock = Lock()
        self.finished = self._read()

    @property
    def made(self) -> Path:
        """The folder that will become the export."""
        return self.folder / "made"

    def _read(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Return (part, layer) -> record; a line that was cut off by a kill counts as not there."""
        self._file.seek(0)
        found = {}
        for line in self._file.read().splitlines():
            with suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                found[record["part"], record["layer"]] = record
        return found

    def add(self, part: str, layer: str, source: int, packed: int) -> None:
        """Note that a layer is finished: the checksums of its weight and of its packed bytes."""
        record = {"part": part, "layer": layer, "source": source, "packed": packed}
        with self._lock:
            self._file.write("\n" + json.dumps(record))  # a new line first: the one before may be cut off
            self._file.flush()

    def close(self) -> None:
        """Let go of the folder; what is finished stays."""
        self._file.close()

    def remove(self) -> None:
        """Remove the folder, and those that killed exports to the same place left behind."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        own = re.compile(f"{re.escape(_prefix(self.place))}[0-9a-f]+{re.escape(SUFFIX)}")
        for left in filter(lambda found: own.fullmatch(found.name), list(self.place.parent.iterdir())):
            with suppress(OSError), (left / FILE).open("a") as file:
                if _locked(file.fileno()):
                    shutil.rmtree(left, ignore_errors=True)


def _prefix(place: Path) -> str:
    return f".{place.name[:150]}."


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            return False
        raise
    return True
