"""The pipelines that come with the package, and where any other lies, by its name: nothing heavy is imported."""

import os
from importlib import resources
from pathlib import Path

from quantdm.errors import QuantDMError, nearest

EMBEDDED = Path(str(resources.files("quantdm.pipelines.embedded")))
_LONE = "a lone denoiser or a file of its weights can be inspected and applied a recipe to"


def known_pipelines() -> list[str]:
    """Return the names of the embedded reference pipelines."""
    return sorted(p.parent.name for p in EMBEDDED.glob("*/model_index.json"))


def pipeline_path(name_or_path: str | Path) -> str:
    """Return where a pipeline lies: an embedded name, a directory, or a hub id (OWNER/NAME) as it is.

    Raises:
        QuantDMError: neither; the message lists the embedded names.
    """
    name = str(name_or_path)
    if name in known_pipelines():
        return str(EMBEDDED / name)
    path = Path(name).expanduser()
    if os.path.isdir(path):  # unlike Path.is_dir, it is quiet about names that are too long or may not be looked at
        if not (path / "model_index.json").is_file():
            raise QuantDMError(
                f"pipeline: {path} has no model_index.json; expected a directory of save_pretrained"
                + (f" ({_LONE})" if (path / "config.json").is_file() else "")
            )
        return str(path)
    if os.path.isfile(path):
        raise QuantDMError(f"pipeline: {path} is a file, expected the directory of a pipeline ({_LONE})")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not os.path.isfile(path.parent):
        return name
    if name.startswith((".", "/", "~")):
        raise QuantDMError(
            f"pipeline: there is no {name}; expected a directory, a hub id OWNER/NAME or an embedded one: "
            + ", ".join(known_pipelines())
        )
    raise QuantDMError(
        f"pipeline: got {name!r}, expected a directory, a hub id OWNER/NAME or an embedded pipeline; "
        + nearest(name, known_pipelines())
    )
