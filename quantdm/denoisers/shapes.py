"""Read the rules of `input_rules` for one denoiser: every shape that each of its arguments may have."""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantdm.denoisers.input_rules import ARGUMENTS, LATENT_ARGUMENTS, LATENTS, LETTERS, SIZES, New, Repeat
from quantdm.denoisers.weights import weight_specs


class _UnknownSizeError(Exception):
    """A shape names what the configuration does not say."""


@dataclass(frozen=True)
class _Sizes:
    """The sizes that the configuration of one denoiser tells."""

    config: Mapping[str, Any]

    def meets(self, condition: str, field: str) -> bool:
        """Say whether a field of the configuration is on ("?") or there ("@")."""
        return field in self.config if condition == "@" else bool(self.config.get(field))

    def get(self, name: str) -> int:
        """Return a size: a number, a letter, a name of SIZES, or a field."""
        if name.lstrip("#").isdigit():
            return int(name)
        for field in SIZES.get(name, (name,)):
            if (size := self._field(field.removeprefix("#"), count=field.startswith("#"))) is not None:
                return size
        if name in LETTERS:
            return LETTERS[name]
        raise _UnknownSizeError(name)

    def _field(self, field: str, *, count: bool) -> int | None:
        field, _, place = field.partition(".")
        value = self.config.get(field)
        if isinstance(value, (list, tuple)) and value:
            value = len(value) if count else value[-1 if place == "last" else int(place or 0)]
        return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def evaluate(self, text: str) -> int:
        """Return the value of sizes that are joined, from left to right, by `*`, `+`, `-` and `/`."""
        first, *rest = re.split(r"([*+/-])", text)
        total = self.get(first)
        for sign, name in zip(rest[::2], rest[1::2], strict=True):
            size = self.get(name)
            total = {"*": total * size, "+": total + size, "-": total - size, "/": total // max(size, 1)}[sign]
        return total


def choices_of(model: nn.Module, config: Mapping[str, Any]) -> tuple[dict[str, list[Any]], list[str]]:
    """Return what each argument of a denoiser's forward may be, likeliest first, and the required ones not known.

    None stands for an argument that is left out.
    """
    sizes = _Sizes(config)
    choices, missing = {}, []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        required = parameter.default is parameter.empty
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        rules = LATENTS[_input_kind(model, sizes)] if name in LATENT_ARGUMENTS else ARGUMENTS.get(name, ())
        listed = "list[" in str(parameter.annotation).lower().partition("dict")[0]
        rules = sorted(rules, key=lambda rule: listed != isinstance(rule, (list, Repeat)) and rule is not None)
        made = ([_new(parameter, sizes)] if isinstance(rule, New) else _values(rule, sizes) for rule in rules)
        values = [value for values in made for value in values if not (required and value is None)]
        if values:
            choices[name] = values if required or None in rules else [*values, None]
        elif required:
            missing.append(name)
    return choices, missing


def _new(parameter: inspect.Parameter, sizes: _Sizes) -> Any:
    """Return what the argument is annotated with, or None where that is no class that the configuration can make."""
    made = parameter.annotation
    if not inspect.isclass(made):
        return None
    names = list(inspect.signature(made).parameters)
    return made(**{name: sizes.config[name] for name in names}) if set(names) <= set(sizes.config) else None


def _input_kind(model: nn.Module, sizes: _Sizes) -> str:
    """Return the kind of the first layer that reads the channels of the latents."""
    try:
        channels = sizes.get("channels")
    except _UnknownSizeError:
        return ""
    return next((s.kind for s in weight_specs(model) if len(s.shape) > 1 and s.shape[1] == channels), "")


def _values(rule: Any, sizes: _Sizes) -> list[Any]:
    try:
        return [_make(rule, sizes)]
    except _UnknownSizeError:
        return []


def _make(rule: Any, sizes: _Sizes) -> Any:
    if isinstance(rule, Repeat):
        return [_make(rule.item, sizes) for _ in range(sizes.evaluate(rule.count))]
    if isinstance(rule, dict):  # what is not switched on is left out
        return {key: value for key, item in rule.items() for value in _values(item, sizes)}
    if isinstance(rule, (list, tuple)):
        return type(rule)(_make(item, sizes) for item in rule)
    return _tensor(rule, sizes) if isinstance(rule, str) else rule


def _tensor(text: str, sizes: _Sizes) -> Tensor | int | str:
    words = text.split()
    while words[0][0] in "?@":
        if not sizes.meets(words[0][0], words[0][1:]):
            raise _UnknownSizeError(words[0])
        words.pop(0)
    if words[0].startswith("'"):
        return words[0][1:]
    if words[0].startswith("="):
        return sizes.evaluate(words[0][1:])
    shape = [sizes.evaluate(word) for word in words[1:]]
    return FILLS[words[0]](shape)


def _last(shape: list[int]) -> Tensor:
    *shape, count = shape
    return (torch.arange(shape[-1]) >= shape[-1] - count).expand(shape)


# What a shape begins with -> the tensor. What models read has values; images and embeddings have none.
FILLS: dict[str, Callable[[list[int]], Tensor]] = {
    "float": lambda shape: torch.empty(shape, device="meta"),
    "complex": lambda shape: torch.empty(shape, device="meta", dtype=torch.complex64),
    "some": torch.ones,
    "zeros": lambda shape: torch.zeros(shape, dtype=torch.long),
    "ones": lambda shape: torch.ones(shape, dtype=torch.long),
    "range": lambda shape: torch.arange(math.prod(shape)).reshape(shape),
    "true": lambda shape: torch.ones(shape, dtype=torch.bool),
    "last": _last,
}
