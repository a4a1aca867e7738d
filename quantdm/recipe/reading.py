"""Read recipe files: plain YAML only, every problem with its line and what to do."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from quantdm.checked import described
from quantdm.errors import QuantDMError, not_yaml
from quantdm.recipe.schema import Recipe, RecipeFile, extended

MAX_BYTES = 2**20  # an exact recipe of the biggest public denoiser takes 60 kB
MAX_DEPTH = 8
Lines = dict[tuple[str, ...], int]
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one reads an exact recipe ten times as fast


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file, and those that it extends.

    Raises:
        QuantDMError: no such file, not plain YAML (aliases, tags and repeated keys are refused), unknown keys, wrong
            types, another version, or files that extend each other; with the line and what to do.
    """
    path = Path(path)
    return recipe_of(_load(path, ()), path)


def recipe_of(content: RecipeFile, path: Path) -> Recipe:
    """Return the complete recipe that a file holds after all `extends`."""
    if content.model is None:
        raise QuantDMError(f"recipe {path}: model: is missing; say which model it is for, e.g. 'model: digits-dit'")
    if not content.has_rules and not content.components and "layers" not in content.model_fields_set:
        raise QuantDMError(
            f"recipe {path}: has none of layers, patterns, types, default and components; give every layer a scheme, "
            "e.g. 'default: kmeans-channel-4'"
        )
    return Recipe(**{key: getattr(content, key) for key in Recipe.model_fields})


def _load(path: Path, above: tuple[Path, ...]) -> RecipeFile:
    what = f"recipe {path}"
    record, lines = _read(path, what)
    try:
        content = RecipeFile.model_validate(record)
    except ValidationError as error:
        raise QuantDMError(_explain(error, what, lines)) from None
    if content.extends is None:
        return content
    base = path.parent / content.extends
    where = f"{what}, line {lines['extends',]}"
    chain = (*above, path.resolve())
    if base.resolve() in chain:
        circle = " -> ".join(p.name for p in (*chain, base.resolve()))
        raise QuantDMError(f"{where}: extends: the files extend each other ({circle}); remove one of these lines")
    if not os.path.isfile(base):
        raise QuantDMError(f"{where}: extends: no file {base}; a relative path starts at the recipe's own directory")
    return extended(_load(base, chain), content)


def _read(path: Path, what: str) -> tuple[dict[str, Any], Lines]:
    """Return a file's plain data and the line on which every key stands."""
    if path.name == "recipe.yaml" and path.with_name("run.json").is_file() and not path.exists():
        raise QuantDMError(
            f"{path.parent}: this run has not chosen a recipe yet; run the command that started it again to go on"
        )
    if not os.path.isfile(path):
        raise QuantDMError(f"recipe: no file {path}; give one of recipes/, or what `quantdm run` or `select` wrote")
    if path.stat().st_size > MAX_BYTES:
        raise QuantDMError(f"{what}: has {path.stat().st_size:,} bytes, expected {MAX_BYTES:,} or less; use patterns")
    lines: Lines = {}
    try:
        text = path.read_text(encoding="utf-8")
        _check_events(text, what)
        loader = _Loader(text)
        node = loader.get_single_node()
        record = None if node is None else _build(loader, node, (), lines, what)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise not_yaml(what, error) from None
    if not isinstance(record, dict):
        raise QuantDMError(f"{what}: got a {type(record).__name__}, expected keys such as 'model' and 'layers'")
    return record, lines


def _check_events(text: str, what: str) -> None:
    """Refuse what grows on reading or names Python objects, before anything is built."""
    try:
        _check_each(yaml.parse(text, Loader=_Loader), what)
    except yaml.YAMLError:
        # The C parser reads ahead and gives up on deep nesting in words of its own, before it hands out an event of it.
        _check_each(yaml.parse(text, Loader=yaml.SafeLoader), what)
        raise


def _check_each(events: Iterable[yaml.Event], what: str) -> None:
    depth = 0
    for event in events:
        where = f"{what}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise QuantDMError(
                f"{where}: not YAML for recipes: aliases (*{event.anchor}) are refused; repeat the value"
            )
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise QuantDMError(f"{where}: not YAML for recipes: the tag {tag} is refused; write plain text and numbers")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise QuantDMError(f"{where}: not YAML for recipes: nested deeper than {MAX_DEPTH}; remove brackets")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _build(loader: Any, node: yaml.Node, path: tuple[str, ...], lines: Lines, what: str) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if isinstance(node, yaml.MappingNode):
        record: dict[str, Any] = {}
        for key_node, value_node in node.value:
            at = key_node.start_mark.line + 1
            key = _scalar(loader, key_node, what)
            if not isinstance(key, str):
                raise QuantDMError(f"{what}, line {at}: got the key {key!r}, expected text; put it in quotes")
            if key in record:
                first = lines[(*path, key)]
                raise QuantDMError(f"{what}, line {at}: {key!r} stands on line {first} already; remove one of the two")
            lines[(*path, key)] = at
            record[key] = _build(loader, value_node, (*path, key), lines, what)
        return record
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*path, str(i)), lines, what) for i, item in enumerate(node.value)]
    return _scalar(loader, node, what)


def _scalar(loader: Any, node: yaml.Node, what: str) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise QuantDMError(f"{what}, line {node.start_mark.line + 1}: got a list or mapping as a key, expected text")
    try:
        return loader.construct_object(node)
    except (ValueError, OverflowError) as error:  # numbers of thousands of digits, impossible dates
        raise QuantDMError(f"{what}, line {node.start_mark.line + 1}: {error}; put the text in quotes") from None


def _explain(error: ValidationError, what: str, lines: Lines) -> str:
    """Return the first three problems, each with its line and a remedy."""
    problems = []
    for problem in error.errors()[:3]:
        loc = tuple(str(part) for part in problem["loc"])
        known = next((loc[:end] for end in range(len(loc), -1, -1) if loc[:end] in lines), ())
        problems.append(f"line {lines.get(known, 1)}: {'.'.join(loc)}: {described(problem, RecipeFile)}")
    return f"{what}, " + "; ".join(problems)
