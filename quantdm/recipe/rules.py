"""How rules meet the layers of a model: globs, regular expressions, precedence, and names that match nothing."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

from quantdm.errors import QuantDMError, counted, nearest

REGEX = "re:"


class Layer(Protocol):
    """What rules look at in a layer."""

    @property
    def name(self) -> str:
        """Dotted path."""
        ...

    @property
    def op_type(self) -> str:
        """Operation type, e.g. `attn1.to_q`."""
        ...


def check_pattern(pattern: str) -> None:
    """Check that a pattern can be used.

    Raises:
        QuantDMError: a regular expression that Python cannot read, or nothing at all.
    """
    if not pattern.removeprefix(REGEX):
        raise QuantDMError(f"pattern {pattern!r}: is empty, expected a glob such as '*.attn1.to_q' or re: and a regex")
    if pattern.startswith(REGEX):
        try:
            re.compile(pattern.removeprefix(REGEX))
        except (re.error, RecursionError, OverflowError) as error:
            raise QuantDMError(f"pattern {pattern!r}: is no regular expression ({error})") from None


def pattern_matcher(pattern: str) -> Callable[[str], bool]:
    """Return the test of a whole layer name: a glob (`*` also crosses dots), or a regular expression after `re:`."""
    if pattern.startswith(REGEX):
        expression = re.compile(pattern.removeprefix(REGEX))
        return lambda name: expression.fullmatch(name) is not None
    return lambda name: fnmatchcase(name, pattern)


def _layer_matcher(pattern: str, also_types: bool) -> Callable[[Layer], bool]:
    matches = pattern_matcher(pattern)
    return lambda layer: matches(layer.name) or (also_types and matches(layer.op_type))


def resolve_rules(
    exact: Mapping[str, str | None],
    patterns: Mapping[str, str | None],
    types: Mapping[str, str | None],
    default: Any,
    layers: Sequence[Layer],
    what: str,
    missing: Any,
    *,
    also_types: bool = False,
) -> dict[str, str | None]:
    """Return layer name -> label; `default` is the label of all other layers, or the mark `missing`.

    With `also_types` a pattern is tried on operation types as well as on names.

    Raises:
        QuantDMError: see `Rules.resolve`.
    """
    names = [layer.name for layer in layers]
    if not patterns and not types and default is missing:
        check_names(exact, names, what=what)
        return {name: exact[name] for name in names}
    matchers = [(_layer_matcher(pattern, also_types), pattern) for pattern in patterns]
    problems = _useless(exact, names, "layer") + _useless(types, list({layer.op_type for layer in layers}), "type")
    problems += [
        f"pattern {pattern!r} matches no layer ({_nearest_parts(pattern, names)})"
        for matches, pattern in matchers
        if not any(matches(layer) for layer in layers)
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise QuantDMError(f"{what} does not fit the model: {'; '.join(problems[:3])}{more}")
    labels: dict[str, Any] = {}
    for layer in layers:
        found = next((patterns[pattern] for matches, pattern in matchers if matches(layer)), missing)
        of_type = types.get(layer.op_type, default) if found is missing else found
        labels[layer.name] = exact.get(layer.name, of_type)
    bare = [name for name, label in labels.items() if label is missing]
    if bare:
        rules = [*patterns, *types, *exact]
        raise QuantDMError(
            f"{what}: no scheme for {counted(len(bare), 'layer')} of the model, first {', '.join(bare[:3])} "
            f"({nearest(bare[0], rules)}); add a pattern or a default"
        )
    return labels


def check_names(exact: Collection[str], layer_names: Sequence[str], *, what: str) -> None:
    """Check that exact names cover exactly the layers of a model.

    Raises:
        QuantDMError: names the first layers that differ, and the nearest ones.
    """
    known = set(layer_names)
    missing = [name for name in layer_names if name not in exact]
    unknown = [name for name in exact if name not in known]
    if missing or unknown:
        parts = []
        if unknown:
            near = f" ({nearest(unknown[0], layer_names)})" if layer_names else ""
            parts.append(
                f"{counted(len(unknown), 'layer')} that the model has not, first {', '.join(unknown[:3])}{near}"
            )
        if missing:
            parts.append(f"no scheme for {counted(len(missing), 'layer')} of the model, first {', '.join(missing[:3])}")
        raise QuantDMError(f"{what} is for another model: it has " + " and ".join(parts))


def _useless(given: Mapping[str, Any], known: Sequence[str], kind: str) -> list[str]:
    present = set(known)
    return [f"the model has no {kind} {name!r} ({nearest(name, known)})" for name in given if name not in present]


def _nearest_parts(pattern: str, names: Sequence[str]) -> str:
    """Return a phrase with the beginnings or ends of layer names that are most like what a pattern spells out."""
    plain = re.sub(r"[*?\\^$()|\[\]+]", "", pattern.removeprefix(REGEX))
    count = plain.strip(".").count(".") + 1
    part = slice(-count, None) if plain.startswith(".") or pattern.startswith("*") else slice(0, count)
    return nearest(plain.strip("."), dict.fromkeys(".".join(name.split(".")[part]) for name in names))
