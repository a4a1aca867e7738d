"""What a model card takes over from the model that was quantized: its name on the Hub, its licence, its languages."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from quantdm.hub.replace import CARD
from quantdm.pipelines.source import local_path

_TAKEN = ("license", "license_name", "license_link", "language")
_SNAPSHOT = re.compile(r"models--(?P<owner>[\w.-]+)--(?P<name>[\w.-]+)/snapshots/[0-9a-f]+/?$")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def head_of_source(source: str | Path) -> dict[str, Any]:
    """Return the entries of a card's head that follow from the quantized model: base model, licence, languages.

    The base model is the model's own name on the Hub, else the one that its own card states: never a place on a disk.
    What its card does not say is left out.
    """
    name, place = str(source), local_path(source)
    card = _front_matter(place / CARD if place.is_dir() else _cached_card(name))
    base: Any = card.get("base_model")
    snapshot = _SNAPSHOT.search(place.resolve().as_posix()) if place.is_dir() else None
    if snapshot is not None:
        base = f"{snapshot['owner']}/{snapshot['name']}"
    elif not place.exists() and _HUB_NAME.fullmatch(name):
        base = name
    names = [base] if isinstance(base, str) else base if isinstance(base, list) else []
    known = [each for each in names if isinstance(each, str) and _HUB_NAME.fullmatch(each)]
    head = {key: card[key] for key in _TAKEN if key in card}
    if known:
        head |= {"base_model": known[0] if len(known) == 1 else known, "base_model_relation": "quantized"}
    return head


def _cached_card(name: str) -> Path | None:
    """Return the card of a model of the Hub, if it lies in the cache; nothing is fetched for it."""
    if not _HUB_NAME.fullmatch(name):
        return None
    found = try_to_load_from_cache(name, CARD)
    return Path(found) if isinstance(found, str) else None


def _front_matter(card: Path | None) -> dict[str, Any]:
    """Return the YAML head of a card; {} where there is none that can be read."""
    if card is None or not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        head = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return head if isinstance(head, dict) else {}
