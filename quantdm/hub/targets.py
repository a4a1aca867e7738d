"""Which models of a pipeline a recipe quantizes, each with its own rules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from quantdm.denoisers.analysis import analyse
from quantdm.denoisers.ensemble import join_layers, join_tables
from quantdm.denoisers.inventory import list_layers
from quantdm.denoisers.tables import list_tables
from quantdm.errors import QuantDMError
from quantdm.hub.quantize import Bank
from quantdm.pipelines.parts import find_denoisers, inputs_by_part
from quantdm.quantizers import QuantizedWeight
from quantdm.recipe import Recipe, joint_config, split_name
from quantdm.recipe.joint import SEPARATOR
from quantdm.schemes import QuantConfig, Scheme

Rules = Recipe | QuantConfig
Target = tuple[Any, Rules, Bank | None]


def targets(pipe: Any, recipe: Recipe | QuantConfig, bank: Bank | None) -> list[Target]:
    """Return the models that a recipe quantizes, each with its rules and where its weights may lie quantized already.

    Raises:
        QuantDMError: components for a lone model or that the pipeline has not, or a denoiser of which nothing is said.
    """
    names = list(recipe.components) if isinstance(recipe, Recipe) else []
    if isinstance(pipe, nn.Module):
        if names:
            raise QuantDMError(
                f"recipe: has components ({', '.join(names)}), got only a {type(pipe).__name__}; apply it to the "
                "pipeline, or one part of it: recipe.component(NAME)"
            )
        return [(pipe, recipe, bank)]
    denoisers = find_denoisers(pipe)
    if isinstance(recipe, QuantConfig):
        rules = _split(recipe, tuple(denoisers))
    else:
        rules = _rules(recipe, tuple(denoisers), type(pipe).__name__)
    _check_parts(pipe, names, main=next(iter(denoisers)))
    return [(pipe.components[name], own, _bank_of(bank, name, denoisers)) for name, own in rules.items()]


def joint_labels(
    pipe: DiffusionPipeline, recipe: Recipe, example_inputs: Mapping[str, Any] | None = None
) -> dict[str, str | None]:
    """Return layer name -> label of all denoisers of a pipeline under a recipe (see `joint_config`), without tables."""
    for module, given in inputs_by_part(pipe, example_inputs):
        analyse(module, example_inputs=given)  # from here on they are known
    layers = {name: list_layers(module) for name, module in find_denoisers(pipe).items()}
    weights = join_layers(layers)
    tables = join_tables({name: list_tables(module) for name, module in find_denoisers(pipe).items()})
    found = joint_config(recipe, [*weights, *tables], tuple(layers)).to_labels()
    return {layer.name: found[layer.name] for layer in weights}


def _split(config: QuantConfig, parts: tuple[str, ...]) -> dict[str, Rules]:
    """Split a joint config over the denoisers."""
    found: dict[str, dict[str, Scheme | None]] = {part: {} for part in parts}
    for name, scheme in config.items():
        part, own = split_name(name, parts)
        found[part][own] = scheme
    return {part: QuantConfig(schemes) for part, schemes in found.items()}


def _rules(recipe: Recipe, parts: tuple[str, ...], pipeline: str) -> dict[str, Rules]:
    """Return the rules of every part that a recipe names; it must not pass over a denoiser."""
    main, *others = parts
    names = list(recipe.components)
    silent = [part for part in others if part not in names] if recipe.has_rules else []
    if silent:
        raise QuantDMError(
            f"recipe for {recipe.model}: says nothing of {', '.join(silent)}, a denoiser of the {pipeline} beside "
            f"{main}; give it rules under `components`, or leave it as it is with "
            f"`components: {{{silent[0]}: {{default: original}}}}`"
        )
    rules: dict[str, Rules] = {main: recipe} if recipe.has_rules or not names else {}
    return rules | {name: recipe.component(name) for name in names}


def _check_parts(pipe: Any, names: list[str], *, main: str) -> None:
    """Refuse components that the pipeline has not, or that are its denoiser."""
    models = [name for name, part in pipe.components.items() if isinstance(part, nn.Module) and name != main]
    for name in names:
        if name not in models:
            raise QuantDMError(
                f"recipe: component {name!r} is no further model of the {type(pipe).__name__}; it has "
                f"{', '.join(models) or 'none'} (the denoiser's rules stand at the top)"
            )


@dataclass(frozen=True)
class _PartBank:
    """The weights of one further denoiser in a bank of all."""

    bank: Bank
    part: str

    def get(self, layer_name: str, scheme: Scheme) -> QuantizedWeight:
        return self.bank.get(f"{self.part}{SEPARATOR}{layer_name}", scheme)

    def other(self, parameter_name: str) -> torch.Tensor | None:
        return self.bank.other(f"{self.part}{SEPARATOR}{parameter_name}")


def _bank_of(bank: Bank | None, part: str, denoisers: Mapping[str, nn.Module]) -> Bank | None:
    if bank is None or part not in denoisers:
        return None
    return bank if part == next(iter(denoisers)) else _PartBank(bank, part)
