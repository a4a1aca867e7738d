"""How far a run is: which stages have their record, how many measurements are finished, who works on what."""

import time
from dataclasses import dataclass
from pathlib import Path

from quantdm.files import read_json
from quantdm.runs.claims import CLAIMS, Claim, Claims
from quantdm.runs.failure import Failure, last_failure
from quantdm.runs.manifest import read_manifest

# What every stage leaves, in their order.
STAGES = {
    "bank": "bank/index.json",
    "sensitivities": "space.json",
    "trials": "trials.json",
    "surrogates": "surrogate.json",
    "recipe": "recipe.yaml",
    "tuning": "tuning.json",
    "correction": "correction.safetensors",
    "final rows": "summary.json",
    "report": "report.html",
}
STORES = ("passes", "trials", "verified", "corrected", "final")  # folders of measurements
RECENT = 20  # measurements of which the rate is taken


@dataclass(frozen=True)
class Status:
    """What is there of a run. `rate` is trials per minute, None where too few tell."""

    stages: dict[str, bool]
    trials: int
    planned: int
    rate: float | None
    last: float | None  # seconds since the last trial was finished
    measurements: dict[str, int]  # store -> finished
    working: dict[str, list[Claim]]  # store -> who has claimed what, the stale left out
    changed: float  # seconds since a file of the run was written
    stopped: Failure | None = None  # why it stopped last, if it has not gone on since

    @property
    def minutes_left(self) -> float | None:
        """Minutes to the last trial at this rate."""
        if self.rate is None or self.trials >= self.planned:
            return None
        return (self.planned - self.trials) / self.rate


def status_of(folder: str | Path) -> Status:
    """Return how far a run is; nothing is opened but its folders, so it costs nothing while others work on it.

    Raises:
        QuantDMError: no run there, or one of another version.
    """
    folder, planned = Path(folder), read_manifest(folder)["trials"]
    finished = {name: _times(folder / name) for name in STORES}
    recent = finished["trials"][-RECENT:]
    span = recent[-1] - recent[0] if len(recent) > 1 else 0.0
    working = {}
    for name in STORES:
        claims = Claims(folder / name / CLAIMS)
        done = {path.stem for path in (folder / name).glob("*.json")}
        found = [claim for claim in claims.living() if claim.key not in done]
        if found:
            working[name] = found
    return Status(
        stages={stage: (folder / name).exists() for stage, name in STAGES.items()},
        trials=len(finished["trials"]),
        planned=_planned(folder, planned),
        rate=60 * (len(recent) - 1) / span if span > 0 else None,
        last=time.time() - recent[-1] if recent else None,
        measurements={name: len(times) for name, times in finished.items()},
        working=working,
        changed=time.time() - max(place.stat().st_mtime for place in (folder, *folder.glob("*/"))),  # files may vanish
        stopped=last_failure(folder),
    )


def _planned(folder: Path, trials: int) -> int:
    """Return how many full labels are planned: fewer of the trials where cheap ones stand for them."""
    path = folder / "trials.json"
    record = read_json(path) if path.is_file() else {}
    return len(record["keys"]) if record.get("cheap", {}).get("kept") else trials


def _times(folder: Path) -> list[float]:
    """Return when the measurements in a folder were finished, in order."""
    return sorted(path.stat().st_mtime for path in folder.glob("*.json"))
