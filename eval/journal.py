"""Finished rows of a long measurement, one JSON line each, so that it goes on where it was stopped."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Journal:
    """Key (plain JSON values) -> row, in a file that grows line by line; a torn last line is ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, Any] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    key, row = json.loads(line)
                except ValueError:
                    continue
                self._rows[json.dumps(key)] = row

    def get(self, key: list[Any]) -> Any:
        """Return the row of a key, or None."""
        return self._rows.get(json.dumps(key))

    def put(self, key: list[Any], row: Any) -> None:
        """Keep a row."""
        self._rows[json.dumps(key)] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, row]) + "\n")

    def rows(self) -> Iterator[tuple[list[Any], Any]]:
        """Yield (key, row) in the order in which they were kept."""
        for key, row in self._rows.items():
            yield json.loads(key), row
