"""Apply a recipe to a live pipeline, and tell diffusers and transformers that quantdm exists."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from diffusers import ModelMixin
from diffusers.quantizers import auto as diffusers_auto
from transformers import PreTrainedModel
from transformers.quantizers import auto as transformers_auto

from quantdm.activations.hooks import activation_spec, set_activation_bits_
from quantdm.correction import register_schedulers
from quantdm.hub.calibrated import with_calibration
from quantdm.hub.config import QuantDMConfig, QuantizationMethod
from quantdm.hub.diffusers_plugin import QuantDMQuantizer
from quantdm.hub.header import layer_table
from quantdm.hub.plan import calibration_of, check_weights, plan_recipe
from quantdm.hub.quantize import Bank, set_packed_
from quantdm.hub.transformers_plugin import QuantDMHfQuantizer
from quantdm.hub.worth import check_plans
from quantdm.recipe import CalibrationSpec, Recipe
from quantdm.schemes import QuantConfig

Model = TypeVar("Model")


def register() -> None:
    """Make `quant_method: quantdm`, and schedulers saved corrected, known; calling it again changes nothing."""
    name = QuantizationMethod.QUANTDM.value
    for auto, quantizer in ((diffusers_auto, QuantDMQuantizer), (transformers_auto, QuantDMHfQuantizer)):
        auto.AUTO_QUANTIZER_MAPPING[name] = quantizer  # type: ignore[assignment]
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name] = QuantDMConfig  # type: ignore[assignment]
    register_schedulers()


def apply_recipe(
    pipe_or_denoiser: Model,
    recipe_or_config: Recipe | QuantConfig | str | Path,
    *,
    bank: Bank | None = None,
    calibration: CalibrationSpec | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    same_architecture: bool = False,
    insist: bool = False,
) -> Model:
    """Quantize a live pipeline's denoiser (or a model) in place: its weights stay packed from now on.

    Components of the recipe (text encoders, VAE) are quantized with it. `pipe.save_pretrained(directory)` then writes
    the packed weights; `from_pretrained` opens them bit by bit the same in any process that imported quantdm.

    Args:
        pipe_or_denoiser: a diffusers pipeline, a denoiser, or a text encoder.
        recipe_or_config: a recipe (or its file), or a scheme for every layer. A recipe also sets activations.
        bank: takes weights of the denoisers that were quantized before instead of quantizing them again.
        calibration: what calibrated schemes are calibrated on (None: what the recipe says). The pipeline makes these
            images in full precision, which takes as long as it takes.
        example_inputs: keyword arguments of one call of the denoiser, where its class and configuration do not tell
            them (see `capture_inputs`); of several denoisers: component name -> keyword arguments.
        same_architecture: take a recipe that was found on other weights of the same architecture.
        insist: also take schemes that cost more bits on their layer than they save.

    Returns:
        The same object.

    Raises:
        QuantDMError: recipe for another model (names the first layers that differ) or for other weights, a component
            that the pipeline has not, already quantized, calibrated schemes and no word on what to calibrate them on,
            weights with NaN, hooks on layers, a glob of the activations that matches nothing, schemes that cost more
            bits than they save. Nothing is changed then.
    """
    register()
    plans = plan_recipe(pipe_or_denoiser, recipe_or_config, bank=bank, example_inputs=example_inputs)
    if not insist:
        check_plans(plans)
    if not same_architecture:
        check_weights(pipe_or_denoiser, recipe_or_config)
    calibration = calibration or calibration_of(recipe_or_config)
    before = [(plan.model, activation_spec(plan.model)) for plan in plans]
    try:
        for plan in plans:
            set_activation_bits_(plan.model, None)
        plans = with_calibration(pipe_or_denoiser, plans, calibration)
        packed = [plan.pack() for plan in plans]
    except BaseException:
        for model, spec in before:
            set_activation_bits_(model, spec)
        raise
    for plan, weights in zip(plans, packed, strict=True):
        set_packed_(plan.model, weights, plan.bank)
        set_activation_bits_(plan.model, plan.config.activations)
        mark_quantized_(plan.model, plan.config)
    return pipe_or_denoiser


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
