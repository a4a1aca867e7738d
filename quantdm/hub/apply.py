"""Apply a recipe to a live pipeline, and tell diffusers and transformers that quantdm exists."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from diffusers import ModelMixin
from diffusers.quantizers import auto as diffusers_auto
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import auto as transformers_auto

from quantdm.activations.bits import layer_bits
from quantdm.activations.hooks import activation_spec, set_activation_bits_
from quantdm.denoisers.analysis import analyse
from quantdm.denoisers.given_inputs import describe_inputs
from quantdm.errors import QuantDMError
from quantdm.hub.config import QuantDMConfig, QuantizationMethod
from quantdm.hub.diffusers_plugin import QuantDMQuantizer
from quantdm.hub.header import layer_table
from quantdm.hub.quantize import Bank, average_bits, model_layers, pack_layers, set_packed_
from quantdm.hub.targets import targets
from quantdm.hub.transformers_plugin import QuantDMHfQuantizer
from quantdm.pipelines.parts import inputs_by_part
from quantdm.recipe import ActivationSpec, Recipe, check_layers, load_recipe
from quantdm.schemes import QuantConfig

Model = TypeVar("Model")


def register() -> None:
    """Make `quant_method: quantdm` known to diffusers and transformers; calling it again changes nothing."""
    name = QuantizationMethod.QUANTDM.value
    for auto, quantizer in ((diffusers_auto, QuantDMQuantizer), (transformers_auto, QuantDMHfQuantizer)):
        auto.AUTO_QUANTIZER_MAPPING[name] = quantizer  # type: ignore[assignment]
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name] = QuantDMConfig  # type: ignore[assignment]


def apply_recipe(
    pipe_or_denoiser: Model,
    recipe_or_config: Recipe | QuantConfig | str | Path,
    *,
    bank: Bank | None = None,
    example_inputs: Mapping[str, Any] | None = None,
) -> Model:
    """Quantize a live pipeline's denoiser (or a model) in place: its weights stay packed from now on.

    Components of the recipe (text encoders, VAE) are quantized with it. `pipe.save_pretrained(directory)` then writes
    the packed weights; `from_pretrained` opens them bit by bit the same in any process that imported quantdm.

    Args:
        pipe_or_denoiser: a diffusers pipeline, a denoiser, or a text encoder.
        recipe_or_config: a recipe (or its file), or a scheme for every layer. A recipe also sets activations.
        bank: takes weights of the denoisers that were quantized before instead of quantizing them again.
        example_inputs: keyword arguments of one call of the denoiser, where its class and configuration do not tell
            them (see `capture_inputs`); of several denoisers: component name -> keyword arguments.

    Returns:
        The same object.

    Raises:
        QuantDMError: recipe for another model (names the first layers that differ), a component that the pipeline has
            not, already quantized, weights with NaN, hooks on layers, a glob of the activations that matches nothing.
            Nothing is changed then.
    """
    register()
    plans = plan_recipe(pipe_or_denoiser, recipe_or_config, bank=bank, example_inputs=example_inputs)
    before = [(plan.model, activation_spec(plan.model)) for plan in plans]
    try:
        for plan in plans:
            set_activation_bits_(plan.model, None)
        packed = [pack_layers(plan.model, plan.schemes, bank=plan.bank, what=plan.config.what) for plan in plans]
    except BaseException:
        for model, spec in before:
            set_activation_bits_(model, spec)
        raise
    for plan, weights in zip(plans, packed, strict=True):
        set_packed_(plan.model, weights, plan.bank)
        set_activation_bits_(plan.model, plan.config.activations)
        mark_quantized_(plan.model, plan.config)
    return pipe_or_denoiser


@dataclass(frozen=True)
class Plan:
    """What a recipe asks of one model: its config, the scheme of every layer, where they may lie quantized already."""

    model: Any
    config: QuantDMConfig
    schemes: QuantConfig
    bank: Bank | None


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
    recipe = load_recipe(recipe_or_config) if isinstance(recipe_or_config, (str, Path)) else recipe_or_config
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
        check_layers(schemes, {layer.name: None for layer in layers}, what=config.what)
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
    layer_bits(model, spec)  # a glob that matches nothing raises before anything is changed


def mark_quantized_(model: Any, config: QuantDMConfig) -> None:
    """Tell a model with packed layers, and through it both libraries, what it was quantized with."""
    if isinstance(model, ModelMixin):
        quantizer = QuantDMQuantizer(config)
        model.register_to_config(quantization_config=config)
    elif isinstance(model, PreTrainedModel):
        quantizer = QuantDMHfQuantizer(config)
        model.config.quantization_config = config
    else:
        return  # a plain module has no save_pretrained to tell
    model.hf_quantizer = quantizer  # pyright: ignore[reportArgumentType]
    quantizer.table = layer_table(model)
    quantizer.own_(model)
    model.quantization_method = config.quant_method  # pyright: ignore[reportArgumentType]
