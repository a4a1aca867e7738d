"""What the original checkpoint of an architecture calls the tensors of diffusers' class, by the rules of a data file.

`gguf_names.json` has rules per class: `diffusers` names the parts whose rows make up, in that order, the tensor
`original`; the names are those of modules, and `.weight` or `.bias` is carried over. `{i}` is an index; in `original`
it is a sum of products of indices and `numbers`, which are entries of the configuration. `x 2/2` is the second half of
the rows of x. `inside` names a table with one such pair per sub-module. The first rule that fits is taken; one with
`beside` fits only where tensors begin with that. `fixed` are entries of the configuration that the original's code has
no switch for.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from quantdm.errors import QuantDMError
from quantdm.files import read_json

RULES = Path(__file__).with_name("gguf_names.json")
FIELD = re.compile(r"\{([^}]+)\}")
REMEDY = "leave names out: the file then has diffusers' names"


class Part(NamedTuple):
    """Rows of a tensor: all of them, or one of `count` equal shares."""

    name: str
    share: int = 1  # counted from 1
    count: int = 1


class Rule(NamedTuple):
    """How one tensor of the original is made."""

    parts: list[str]
    original: str
    beside: str | None


def original_names(kind: str, config: Mapping[str, Any], names: Collection[str]) -> dict[str, list[Part]]:
    """Return the tensors of the original checkpoint, by name, and of what rows each is made.

    Args:
        kind: diffusers' class.
        config: its configuration.
        names: the tensors that there are; every one of them is used.

    Raises:
        QuantDMError: a class without rules, or one whose tensors the original does not have.
    """
    known = read_json(RULES)
    if kind not in known:
        raise QuantDMError(
            f"names: got a {kind}; the names of original checkpoints are known for {', '.join(known)}; {REMEDY}"
        )
    for entry, value in known[kind].get("fixed", {}).items():
        if config.get(entry, value) != value:
            raise QuantDMError(f"names: the original has {entry} {value!r}, got {config[entry]!r}; {REMEDY}")
    numbers = {letter: config[entry] for letter, entry in known[kind].get("numbers", {}).items()}
    if not all(isinstance(number, int) for number in numbers.values()):
        raise QuantDMError(f"names: the original {kind} has as many layers in every block, got {numbers}; {REMEDY}")
    rules, found = list(_rules(known[kind])), {}
    for name in names:
        found.update(_apply(rules, numbers, name, names))
    used = {part.name for parts in found.values() for part in parts}
    if odd := sorted(used.symmetric_difference(names)):
        what = "lacks" if odd[0] in used else "has"
        raise QuantDMError(
            f"names: this {kind} is not laid out like its original: it {what} {odd[0]} and {len(odd) - 1} more such "
            f"tensors; {REMEDY}"
        )
    return found


def _rules(known: dict[str, Any]) -> Iterator[Rule]:
    """Yield the rules of a class, those with a table one by one."""
    for rule in known["rules"]:
        parts, original, beside = rule["diffusers"], rule["original"], rule.get("beside")
        if "inside" not in rule:
            yield Rule(parts, original, beside)
            continue
        for inner, theirs in known["tables"][rule["inside"]].items():
            yield Rule([f"{parts[0]}.{inner}"], f"{original}.{theirs}", beside)


def _apply(rules: list[Rule], numbers: Mapping[str, int], name: str, names: Collection[str]) -> dict[str, list[Part]]:
    """Return what a tensor, as the first part of one, belongs to; nothing if it is no first part."""
    for rule in rules:
        match = _pattern(rule.parts[0].partition(" ")[0]).fullmatch(name)
        if match is None:
            continue
        values = {**numbers, **{key: int(value) for key, value in match.groupdict().items() if key != "leaf"}}
        beside = rule.beside and _filled(rule.beside, values)
        if beside and not any(other.startswith(beside) for other in names):
            continue
        leaf = match["leaf"]
        parts = [_part(_filled(text, values), leaf) for text in rule.parts]
        return {_filled(rule.original, values) + leaf: parts}
    return {}


def _pattern(text: str) -> re.Pattern[str]:
    """Return what the names of a module's tensors look like; `re` keeps the compiled ones."""
    fields = FIELD.split(text)
    for place in range(1, len(fields), 2):
        fields[place] = rf"(?P<{fields[place]}>\d+)"
    fields[::2] = [re.escape(plain) for plain in fields[::2]]
    return re.compile("".join(fields) + r"(?P<leaf>(\.weight|\.bias)?)")


def _filled(text: str, values: Mapping[str, int]) -> str:
    """Return a name with its indices worked out."""

    def number(match: re.Match[str]) -> str:
        products = [product.split("*") for product in match[1].split("+")]
        return str(sum(math.prod(int(values.get(x, x)) for x in factors) for factors in products))

    return FIELD.sub(number, text)


def _part(text: str, leaf: str) -> Part:
    name, _, share = text.partition(" ")
    first, _, count = share.partition("/")
    return Part(name + leaf, int(first or 1), int(count or 1))
