"""The record of how a run's budget for a whole pipeline is split, and what it says of a recipe's further parts."""

from pathlib import Path
from typing import Any

from quantdm.errors import QuantDMError
from quantdm.files import digest, read_json
from quantdm.recipe import Recipe, Rules
from quantdm.runs.run import Run, RunSettings

SPLIT_FILE, SPLIT_VERSION = "split.json", 1


def split_inputs(settings: RunSettings) -> str:
    """Return the hash of everything that determines the split."""
    names = ("target_pipeline_bytes", "options", "embeddings", "label_images", "label_steps", "seed")
    record = settings.model_dump(mode="json")
    weights = {name: part.fingerprint for name, part in settings.seen.parts.items()}
    return digest({name: record.get(name) for name in names}, weights)


def load_split(folder: str | Path, settings: RunSettings) -> dict[str, Any] | None:
    """Return the split of a run directory: parts with bytes and rules, the denoisers' bits.

    None: there is none yet, or no target for the whole pipeline, or the record is of another one.
    """
    path = Path(folder) / SPLIT_FILE
    if settings.target_pipeline_bytes is None or not path.is_file():
        return None
    record = read_json(path, version=SPLIT_VERSION)
    return record if record["inputs"] == split_inputs(settings) else None


def settled(folder: str | Path, settings: RunSettings) -> RunSettings:
    """Return settings with the bits that a split which is there leaves for the denoisers."""
    record = load_split(folder, settings)
    return settings if record is None else settings.model_copy(update={"target_bits": record["target_bits"]})


def parts_of(run: Run, recipe: Recipe) -> dict[str, str] | None:
    """Return part -> label of the parts beside the denoisers that a recipe quantizes; None: none of them.

    Raises:
        QuantDMError: it quantizes one otherwise than the run's split does, which nobody measured.
    """
    known = (load_split(run.folder, run.settings) or {}).get("parts", {})
    further = {name: rules for name, rules in recipe.components.items() if name not in run.settings.seen.denoisers}
    changed = [name for name, rules in further.items() if rules_in(known.get(name)) != rules]
    if changed:
        raise QuantDMError(
            f"recipe for {recipe.model}: also quantizes {', '.join(changed)}, which a run does not measure; expected "
            "rules for the denoiser alone: take its components out"
        )
    return {name: known[name]["label"] for name in further} or None


def rules_in(record: dict[str, Any] | None) -> Rules | None:
    """Return the rules that a split has for a part; None: it stays as it is."""
    return None if record is None or record["rules"] is None else Rules.model_validate(record["rules"])


def told_split(run: Run) -> list[str]:
    """Return a line for every part of a pipeline, and what remains for its denoisers; none without such a target."""
    record = load_split(run.folder, run.settings)
    if record is None:
        return []
    left, bits = record["denoisers"]["at_most"], record["target_bits"]
    names = ", ".join(run.settings.seen.denoisers)
    return [*notes_of(record), f"{names}: {left} bytes remain, {bits:.3f} bits per weight"]


def notes_of(record: dict[str, Any]) -> tuple[str, ...]:
    """Return a line for every part: its bytes before and after."""
    notes = []
    for name, part in record["parts"].items():
        now = "as it was" if part["label"] is None else f"now {part['after']} ({part['label']})"
        notes.append(f"{name}: {part['before']} bytes, {now}")
    return tuple(notes)
