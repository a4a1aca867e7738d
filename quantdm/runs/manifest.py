"""The manifest of a run directory, as plain data: whoever only looks need not open the pipeline's world."""

import os
from pathlib import Path
from typing import Any

from quantdm.errors import QuantDMError
from quantdm.files import read_json

RUN_VERSION = 2
MANIFEST = "run.json"


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Return what the manifest of a run says.

    Raises:
        QuantDMError: no run there, or one of another version.
    """
    manifest = Path(folder) / MANIFEST
    if not os.path.isfile(manifest):
        raise QuantDMError(f"no run in {folder}: {manifest.name} is missing; start one with `quantdm run`")
    return read_json(manifest, version=RUN_VERSION)
