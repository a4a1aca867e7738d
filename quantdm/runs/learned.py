"""What earlier runs of other models teach a new one before its first trial."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantdm.errors import QuantDMError, told
from quantdm.files import digest
from quantdm.runs.manifest import read_manifest
from quantdm.runs.run import MIN_TRIALS, Run
from quantdm.runs.stages import LEARNED_VERSION, load_space
from quantdm.runs.trials import load_labels
from quantdm.schemes import Scheme
from quantdm.surrogates.transfer import learn, share


def check_donors(folders: Sequence[str | Path]) -> None:
    """Check, before anything is opened, that others' runs are there.

    Raises:
        QuantDMError: a folder that holds no run.
    """
    for folder in folders:
        with told(f"learned from {folder}"):
            read_manifest(folder)


def learn_from(folders: Sequence[str | Path], options: Sequence[Scheme]) -> dict[str, Any]:
    """Return the record of what runs teach: effects of roles, methods, widths, options and their pairs.

    Args:
        folders: run directories; what they hold is read and copied, they are not needed afterwards.
        options: of the new run.

    Raises:
        QuantDMError: no run there, no or too few trials, or one of another options set: it shares no option.
    """
    donors, sources, wanted = [], [], {scheme.label for scheme in options}
    for folder in folders:
        run = Run.open(folder)
        space = load_space(run)
        choices, y, _ = load_labels(run, space)
        if len(y) < MIN_TRIALS:
            raise QuantDMError(
                f"learned from {folder}: that run has {len(y)} trials, expected {MIN_TRIALS} or more; let it go on "
                "first, or leave it out"
            )
        if not wanted & set(space.labels):
            raise QuantDMError(
                f"learned from {folder}: that run measured other options ({', '.join(space.labels[:3])}...), none of "
                f"which this one has ({', '.join(sorted(wanted)[:3])}...); give a run with the same options"
            )
        donors.append(learn(space, choices, y))
        sources.append({"model": Path(run.settings.model).name, "trials": len(y)})
    shared = share(donors)
    effects = dict(zip(shared.names, shared.mean.tolist(), strict=True))
    return {"version": LEARNED_VERSION, "sources": sources, "effects": effects, "digest": digest(effects)}
