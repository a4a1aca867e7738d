"""YAML files that people write: plain data, and every key once."""

from typing import Any

import yaml

from quantdm.errors import QuantDMError


class _Loader(yaml.SafeLoader):
    """Refuse what YAML lets pass: of two equal keys of a mapping the last would count, in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                first = seen[key.value]
                raise QuantDMError(f"line {line}: {key.value!r} stands on line {first} already; remove one of the two")
            seen[key.value] = line
        return super().construct_mapping(node, deep=deep)


def load_yaml(text: str) -> Any:
    """Return the data of a YAML text.

    Raises:
        QuantDMError: a key stands twice in a mapping.
        yaml.YAMLError: it is no YAML.
    """
    return yaml.load(text, Loader=_Loader)
