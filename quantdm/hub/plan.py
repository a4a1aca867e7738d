"""What a recipe asks of every model of a pipeline, before anything is changed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from quantdm.activations.hooks import activation_spec
from quantdm.denoisers.analysis import analyse
from quantdm.denoisers.given_inputs import describe_inputs
from quantdm.denoisers.inventory import list_layers
from quantdm.errors import QuantDMError
from quantdm.hub.config import QuantDMConfig
from quantdm.hub.quantize import Bank, average_bits, check_fits, model_layers, pack_layers
from quantdm.hub.targets import targets
from quantdm.pipelines.parts import find_denoisers, inputs_by_part
from quantdm.pipelines.sketch import check_same_weights, sketch, sketch_of
from quantdm.pipelines.tensor_files import LazyTensor
from quantdm.quantizers import Moments, QuantizedWeight
from quantdm.quantizers.options import SWEEPS
from quantdm.recipe import ActivationSpec, CalibrationSpec, Recipe, load_recipe
from quantdm.schemes import QuantConfig

Rules = TypeVar("Rules", Recipe, QuantConfig, Recipe | QuantConfig)


@dataclass(frozen=True)
class Plan:
    """What a recipe asks of one model: its config, the scheme of every layer, where they may lie quantized already.

    `moments` are those of the layers that are calibrated, `sweeps` what `quantize_weight` makes of them.
    """

    model: Any
    config: QuantDMConfig
    schemes: QuantConfig
    bank: Bank | None
    moments: Mapping[str, Moments] = field(default_factory=dict)
    sweeps: int = SWEEPS

    def pack(self) -> dict[str, QuantizedWeight]:
        """Return the packed weight of every layer that has a scheme; errors as `pack_layers`."""
        what, given = self.config.what, self.moments
        return pack_layers(self.model, self.schemes, bank=self.bank, moments=given, sweeps=self.sweeps, what=what)


def read_if_path(recipe: Rules | str | Path) -> Rules | Recipe:
    """Return the recipe in a file, or what is none as it is."""
    return load_recipe(recipe) if isinstance(recipe, (str, Path)) else recipe


def plan_recipe(
    pipe_or_denoiser: Any,
    recipe_or_config: Recipe | QuantConfig | str | Path,
    *,
    bank: Bank | None = None,
    example_inputs: Mapping[str, Any] | None = None,
) -> list[Plan]:
    """Return what a recipe asks of every model that it quantizes; arguments and errors as `apply_recipe`.

    Models may be on the meta device; nothing is changed.
    """
    if isinstance(recipe_or_config, Mapping) and not isinstance(recipe_or_config, QuantConfig):
        raise QuantDMError(
            "recipe: got a dict, expected a Recipe or QuantConfig; wrap it: QuantConfig.from_labels(...)"
        )
    recipe = read_if_path(recipe_or_config)
    inputs = inputs_by_part(pipe_or_denoiser, example_inputs)
    for model, given in inputs:
        analyse(model, example_inputs=given)  # from here on they are known
    plans = []
    for model, part, stored in targets(pipe_or_denoiser, recipe, bank):
        given = next((describe_inputs(own) for owner, own in inputs if owner is model), None)
        config = QuantDMConfig(recipe=part, example_inputs=given)
        config.activations = config.activations or activation_spec(model)
        _check_activations(model, config.activations)
        layers = model_layers(model)
        schemes = config.schemes_for(layers)
        check_fits(schemes, layers, what=config.what)
        config.avg_bits = round(average_bits(layers, schemes), 6)
        plans.append(Plan(model, config, schemes, stored))
    return plans


def _check_activations(model: nn.Module, spec: ActivationSpec | None) -> None:
    if spec is None:
        return
    if isinstance(model, PreTrainedModel):
        raise QuantDMError(
            f"activations: are quantized in denoisers only, got a {type(model).__name__}; leave them out"
        )
    spec.resolve(list_layers(model))  # a rule that matches nothing raises before anything is changed


def check_weights(
    pipe_or_denoiser: Any,
    recipe_or_config: Recipe | QuantConfig | str | Path,
    stored: Mapping[str, Mapping[str, LazyTensor]] | None = None,
) -> None:
    """Check that the denoisers have the weights that a recipe was found on, where it says so.

    Args:
        stored: component name -> tensors of networks that are not in memory.

    Raises:
        QuantDMError: other weights.
    """
    recipe = read_if_path(recipe_or_config)
    known = recipe.provenance.weights if isinstance(recipe, Recipe) else {}
    if not known:
        return
    lone = isinstance(pipe_or_denoiser, nn.Module)
    models = {next(iter(known)): pipe_or_denoiser} if lone else find_denoisers(pipe_or_denoiser)
    if lone and (len(known) > 1 or isinstance(pipe_or_denoiser, PreTrainedModel)):
        return  # which of several it is, or that it is none, its recipe does not tell
    now = {}
    for name, model in models.items():
        tensors = (stored or {}).get("" if lone else name)
        names = sorted(name for name, _ in model.named_parameters())
        now[name] = sketch_of(model) if not tensors else sketch((key, tensors[key].read()) for key in names)
    check_same_weights(known, now)


def calibration_of(recipe_or_config: Recipe | QuantConfig | str | Path) -> CalibrationSpec | None:
    """Return what a recipe was calibrated on, if it says so."""
    recipe = read_if_path(recipe_or_config)
    return recipe.calibration if isinstance(recipe, Recipe) else None
