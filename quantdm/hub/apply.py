"""Apply a recipe to a live pipeline, and tell diffusers and transformers that quantdm exists."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from diffusers import ModelMixin
from diffusers.quantizers import auto as diffusers_auto
from transformers import PreTrainedModel
from transformers.quantizers import auto as transformers_auto

from quantdm.denoisers.pipeline import get_denoiser
from quantdm.errors import QuantDMError
from quantdm.hub.checkpoint import layer_table
from quantdm.hub.config import QuantDMConfig, QuantizationMethod
from quantdm.hub.layers import Bank, quantize_layers_
from quantdm.hub.quantizer import QuantDMHfQuantizer, QuantDMQuantizer
from quantdm.modules.activations import activation_spec, layer_bits, set_activation_bits_
from quantdm.recipe import Recipe, load_recipe
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

    `pipe.save_pretrained(directory)` then writes the packed weights; `from_pretrained` opens them bit by bit the same
    in any process that imported quantdm.

    Args:
        pipe_or_denoiser: a diffusers pipeline, a denoiser, or a text encoder.
        recipe_or_config: a recipe (or its file), or a scheme for every layer. A recipe also sets activations.
        bank: takes weights that were quantized before instead of quantizing them again.

    Returns:
        The same object.

    Raises:
        QuantDMError: recipe for another model (names the first layers that differ), already quantized, weights with
            NaN, hooks on layers, a glob of the activations that matches nothing. The model is unchanged then.
    """
    register()
    model: Any = get_denoiser(pipe_or_denoiser)  # type: ignore[arg-type]
    if isinstance(recipe_or_config, Mapping) and not isinstance(recipe_or_config, QuantConfig):
        raise QuantDMError(
            "recipe: got a dict, expected a Recipe or QuantConfig; wrap it: QuantConfig.from_labels(...)"
        )
    recipe = load_recipe(recipe_or_config) if isinstance(recipe_or_config, (str, Path)) else recipe_or_config
    config = QuantDMConfig(recipe=recipe)
    assert config.schemes is not None
    before = activation_spec(model)
    if config.activations is None:
        config.activations = before
    if config.activations is not None and isinstance(model, PreTrainedModel):
        raise QuantDMError(
            f"activations: are quantized in denoisers only, got a {type(model).__name__}; leave them out"
        )
    if config.activations is not None:
        layer_bits(model, config.activations)  # a glob that matches nothing raises before anything is changed
    set_activation_bits_(model, None)
    try:
        quantize_layers_(
            model, config.schemes, bank=bank, what=f"recipe for {config.model}" if config.model else "config"
        )
    except BaseException:
        set_activation_bits_(model, before)
        raise
    set_activation_bits_(model, config.activations)
    _mark_quantized_(model, config)
    return pipe_or_denoiser


def _mark_quantized_(model: Any, config: QuantDMConfig) -> None:
    if isinstance(model, ModelMixin):
        quantizer = QuantDMQuantizer(config)
        quantizer.table = layer_table(model)
        model.register_to_config(quantization_config=config)
    elif isinstance(model, PreTrainedModel):
        quantizer = QuantDMHfQuantizer(config)
        model.config.quantization_config = config
    else:
        return  # a plain module has no save_pretrained to tell
    model.hf_quantizer = quantizer  # pyright: ignore[reportArgumentType]
    model.is_quantized = True  # pyright: ignore[reportArgumentType]
    model.quantization_method = config.quant_method  # pyright: ignore[reportArgumentType]
