"""Apply a recipe to a live pipeline, and tell diffusers and transformers that quantdm exists."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from diffusers import ModelMixin
from diffusers.quantizers import auto as diffusers_auto
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import auto as transformers_auto

from quantdm.activations.bits import layer_bits
from quantdm.activations.hooks import activation_spec, set_activation_bits_
from quantdm.errors import QuantDMError
from quantdm.hub.config import QuantDMConfig, QuantizationMethod
from quantdm.hub.diffusers_plugin import QuantDMQuantizer
from quantdm.hub.header import layer_table
from quantdm.hub.quantize import Bank, average_bits, model_layers, pack_layers, set_packed_
from quantdm.hub.transformers_plugin import QuantDMHfQuantizer
from quantdm.pipelines.parts import get_denoiser
from quantdm.quantizers import QuantizedWeight
from quantdm.recipe import ActivationSpec, Recipe, load_recipe
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
) -> Model:
    """Quantize a live pipeline's denoiser (or a model) in place: its weights stay packed from now on.

    Components of the recipe (text encoders, VAE) are quantized with it. `pipe.save_pretrained(directory)` then writes
    the packed weights; `from_pretrained` opens them bit by bit the same in any process that imported quantdm.

    Args:
        pipe_or_denoiser: a diffusers pipeline, a denoiser, or a text encoder.
        recipe_or_config: a recipe (or its file), or a scheme for every layer. A recipe also sets activations.
        bank: takes weights of the denoiser that were quantized before instead of quantizing them again.

    Returns:
        The same object.

    Raises:
        QuantDMError: recipe for another model (names the first layers that differ), a component that the pipeline has
            not, already quantized, weights with NaN, hooks on layers, a glob of the activations that matches nothing.
            Nothing is changed then.
    """
    register()
    if isinstance(recipe_or_config, Mapping) and not isinstance(recipe_or_config, QuantConfig):
        raise QuantDMError(
            "recipe: got a dict, expected a Recipe or QuantConfig; wrap it: QuantConfig.from_labels(...)"
        )
    recipe = load_recipe(recipe_or_config) if isinstance(recipe_or_config, (str, Path)) else recipe_or_config
    before: list[tuple[Any, ActivationSpec | None]] = []
    packed: list[tuple[Any, QuantDMConfig, dict[str, QuantizedWeight]]] = []
    try:
        for model, part, stored in _targets(pipe_or_denoiser, recipe, bank):
            config = QuantDMConfig(recipe=part)
            spec = activation_spec(model)
            config.activations = config.activations or spec
            _check_activations(model, config.activations)
            layers = model_layers(model)
            schemes = config.schemes_for(layers)
            before.append((model, spec))
            set_activation_bits_(model, None)
            packed.append((model, config, pack_layers(model, schemes, bank=stored, what=config.what)))
            config.avg_bits = round(average_bits(layers, schemes), 6)
    except BaseException:
        for model, spec in before:
            set_activation_bits_(model, spec)
        raise
    for model, config, weights in packed:
        set_packed_(model, weights)
        set_activation_bits_(model, config.activations)
        _mark_quantized_(model, config)
    return pipe_or_denoiser


def _targets(
    pipe: Any, recipe: Recipe | QuantConfig, bank: Bank | None
) -> list[tuple[Any, Recipe | QuantConfig, Bank | None]]:
    """Return the models that a recipe quantizes, each with its rules."""
    names = list(recipe.components) if isinstance(recipe, Recipe) else []
    if names and isinstance(pipe, nn.Module):
        raise QuantDMError(
            f"recipe: has components ({', '.join(names)}), got only a {type(pipe).__name__}; apply it to the pipeline, "
            "or one part of it: recipe.component(NAME)"
        )
    targets: list[tuple[Any, Recipe | QuantConfig, Bank | None]] = []
    if not isinstance(recipe, Recipe) or recipe.has_rules or not names:
        targets.append((get_denoiser(pipe), recipe, bank))
    for name in names:
        assert isinstance(recipe, Recipe)
        part = getattr(pipe, "components", {}).get(name)
        if not isinstance(part, nn.Module) or part is get_denoiser(pipe):
            models = [n for n, c in pipe.components.items() if isinstance(c, nn.Module) and c is not get_denoiser(pipe)]
            raise QuantDMError(
                f"recipe: component {name!r} is no further model of the {type(pipe).__name__}; it has "
                f"{', '.join(models) or 'none'} (the denoiser's rules stand at the top)"
            )
        targets.append((part, recipe.component(name), None))
    return targets


def _check_activations(model: nn.Module, spec: ActivationSpec | None) -> None:
    if spec is None:
        return
    if isinstance(model, PreTrainedModel):
        raise QuantDMError(
            f"activations: are quantized in denoisers only, got a {type(model).__name__}; leave them out"
        )
    layer_bits(model, spec)  # a glob that matches nothing raises before anything is changed


def _mark_quantized_(model: Any, config: QuantDMConfig) -> None:
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
