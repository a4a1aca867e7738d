"""Rules for embedding tables: a rule that reaches Linear or Conv layers reaches no table.

So a recipe that was written before tables could be quantized leaves them as they are, whatever its patterns and its
default are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantdm.recipe.rules import Layer, pattern_matcher

TABLE = "embedding"  # the kind of a layer that is an embedding table


def is_table(layer: object) -> bool:
    """Whether a layer is an embedding table, and not a Linear or Conv layer."""
    return getattr(layer, "kind", None) == TABLE


@dataclass(frozen=True)
class Split:
    """Rules and layers, those of Linear and Conv layers apart from those of tables."""

    weights: list[Layer]
    tables: list[Layer]
    exact: dict[str, str | None]
    patterns: dict[str, str | None]
    types: dict[str, str | None]
    of_tables: dict[str, dict[str, str | None]] = field(default_factory=dict)

    def table_labels(self, default: str | None) -> dict[str, str]:
        """Return table -> label: exact name > first pattern > type > default; tables that stay original are left out.

        Args:
            default: of every table that no rule reaches.
        """
        matchers = [(pattern_matcher(pattern), label) for pattern, label in self.of_tables["patterns"].items()]
        found: dict[str, Any] = {}
        for table in self.tables:
            by_type = self.of_tables["types"].get(table.op_type, default)
            label = next((label for matches, label in matchers if matches(table.name)), by_type)
            found[table.name] = self.of_tables["exact"].get(table.name, label)
        return {name: label for name, label in found.items() if label is not None}


def split_rules(
    exact: Mapping[str, str | None],
    patterns: Mapping[str, str | None],
    types: Mapping[str, str | None],
    layers: Sequence[Layer],
) -> Split:
    """Part the rules of one model: those that reach embedding tables alone are the tables' own."""
    weights = [layer for layer in layers if not is_table(layer)]
    tables = [layer for layer in layers if is_table(layer)]
    names, kinds = {table.name for table in tables}, {table.op_type for table in tables}
    kinds -= {layer.op_type for layer in weights}
    own = {pattern for pattern in patterns if tables and _reaches(pattern, tables) and not _reaches(pattern, weights)}
    parts = {"exact": (exact, names), "patterns": (patterns, own), "types": (types, kinds)}
    rest = {key: {k: v for k, v in rules.items() if k not in of} for key, (rules, of) in parts.items()}
    of_tables = {key: {k: v for k, v in rules.items() if k in of} for key, (rules, of) in parts.items()}
    return Split(weights, tables, rest["exact"], rest["patterns"], rest["types"], of_tables)


def _reaches(pattern: str, layers: Sequence[Layer]) -> bool:
    matches = pattern_matcher(pattern)
    return any(matches(layer.name) for layer in layers)
