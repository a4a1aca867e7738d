"""Recipes of pipelines with several denoisers: one joint config, `PART:layer` for every part but the first.

In a recipe the main denoiser's rules stand at the top, those of further ones under `components`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from quantdm.recipe.rules import Layer
from quantdm.recipe.schema import Recipe, Rules
from quantdm.recipe.tables import is_table
from quantdm.schemes import QuantConfig, Scheme

SEPARATOR = ":"


class _Own(NamedTuple):
    """A layer under its name within its part."""

    name: str
    op_type: str
    kind: str


def joint_prefix(part: str, number: int) -> str:
    """Return what stands before the names of a part in joint names; `number` counts the parts, the main one is 0."""
    return f"{part}{SEPARATOR}" if number else ""


def split_name(name: str, parts: Sequence[str]) -> tuple[str, str]:
    """Return the part that a joint name belongs to, and its name there; `parts` are all parts, the main one first."""
    head, separator, tail = name.partition(SEPARATOR)
    return (head, tail) if separator and head in parts[1:] else (parts[0], name)


def joint_config(recipe: Recipe, layers: Iterable[Layer], parts: Sequence[str]) -> QuantConfig:
    """Return the scheme of every layer of every denoiser; a denoiser without rules stays in its original precision.

    Embedding tables are among them if `layers` has their records and they do not stay as they are.

    Args:
        recipe: patterns and types are resolved.
        layers: those of all denoisers, under joint names and operation types.
        parts: the denoisers, the main one first.

    Raises:
        QuantDMError: the recipe does not fit the layers.
    """
    layers = list(layers)
    schemes: dict[str, Scheme | None] = {}
    for part in parts:
        own = {layer.name: layer for layer in layers if split_name(layer.name, parts)[0] == part}
        records = [
            _Own(split_name(la.name, parts)[1], split_name(la.op_type, parts)[1], getattr(la, "kind", ""))
            for la in own.values()
        ]
        rules: Recipe | None = recipe
        if part != parts[0]:
            rules = recipe.component(part) if part in recipe.components else None
        found = {} if rules is None else rules.resolve(records, what=f"recipe for {rules.model}")
        for name, record in zip(own, records, strict=True):
            if record.name in found or not is_table(record):
                schemes[name] = found[record.name] if found else None
    return QuantConfig({layer.name: schemes[layer.name] for layer in layers if layer.name in schemes})


def joint_rules(
    labels: Mapping[str, str | None], parts: Sequence[str], *, embeddings: str | None = None
) -> dict[str, Any]:
    """Return the rules of the recipe that a joint config means (the inverse of `joint_config`).

    Args:
        labels: layer name -> label.
        parts: the denoisers, the main one first.
        embeddings: label of their embedding tables (None: they stay as they are).
    """
    found: dict[str, dict[str, str | None]] = {part: {} for part in parts}
    for name, label in labels.items():
        part, own = split_name(name, parts)
        found[part][own] = label
    main, *others = parts
    components = {part: Rules(layers=found[part], embeddings=embeddings) for part in others}
    return {"layers": found[main], "components": components, "embeddings": embeddings}
