"""The trial store: one JSON file per trial, named by the hash of everything that determines its label."""

import contextlib
import math
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from quantdm.errors import QuantDMError
from quantdm.files import check_output, parse_json, read_bytes, write_json

TRIAL_VERSION = 1


class TrialStore:
    """A folder of finished trials: each exists completely or not at all, so a killed run loses only those in flight."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        """Return where the trial of that key lies."""
        return self.folder / f"{key}.json"

    def get(self, key: str) -> dict[str, Any] | None:
        """Return what was put, or None."""
        path = self.path(key)
        data = read_bytes(path)
        if not data:  # a power cut leaves files without content
            return None
        record = parse_json(data, path, version=TRIAL_VERSION)
        if record.get("key") != key:
            raise QuantDMError(f"{path}: holds trial {record.get('key')}, expected {key}; delete the file")
        return {name: value for name, value in record.items() if name not in ("version", "key")}

    def put(self, key: str, record: dict[str, Any]) -> None:
        """Keep a finished trial; one that is there stays.

        Raises:
            QuantDMError: a figure is NaN or infinite, or the file cannot be written; nothing is kept then.
        """
        bad = next((k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)), None)
        if bad is not None:
            raise QuantDMError(
                f"trial {key}: its worker measured {bad} = {record[bad]}, expected a number; run it again, and if that "
                "repeats itself leave the scheme out or compute in float32"
            )
        path = self.path(key)
        with contextlib.suppress(OSError):  # what a power cut left without content would stay
            if path.stat().st_size == 0 and path.is_file():
                path.unlink(missing_ok=True)
        # Waiting for the disk would take longer than all else; a torn record is seen when it is read.
        write_json(path, {"version": TRIAL_VERSION, "key": key, **record}, durable=False, replace=False)

    def check_own(self, keys: Collection[str] | None = None) -> None:
        """Check that trials may be put here: the folder can be written and holds nothing but trials of these keys.

        Args:
            keys: those that will be put (None: not known yet, trials of any key may be there).

        Raises:
            QuantDMError: a file in its place, no permission, or other files or trials in it.
        """
        real = check_output(self.folder, folder=True)
        for path in sorted(real.iterdir()) if real.is_dir() else ():
            if path.name.startswith("."):  # claims of running processes
                continue
            if not self._is_trial(path) or (keys is not None and path.stem not in keys):
                raise QuantDMError(
                    f"{self.folder}: holds {path.name}, which is none of these trials; choose an empty or new directory"
                )

    def _is_trial(self, path: Path) -> bool:
        try:
            return path.suffix == ".json" and self.get(path.stem) is not None
        except QuantDMError:
            return False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for key in sorted(self.keys()):
            record = self.get(key)
            if record is not None:
                yield {"key": key, **record}

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self) -> set[str]:
        """Return the keys of the finished trials, by one look at the folder."""
        try:
            names = os.listdir(self.folder)
        except (FileNotFoundError, NotADirectoryError):  # who puts something there is told
            return set()
        return {name.removesuffix(".json") for name in names if name.endswith(".json") and not name.startswith(".")}
