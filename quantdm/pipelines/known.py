"""The pipelines that come with the package, for those who only ask for their names: nothing heavy is imported."""

from importlib import resources
from pathlib import Path

EMBEDDED = Path(str(resources.files("quantdm.pipelines.embedded")))


def known_pipelines() -> list[str]:
    """Return the names of the embedded reference pipelines."""
    return sorted(p.parent.name for p in EMBEDDED.glob("*/model_index.json"))
