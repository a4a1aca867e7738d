"""`QuantDMConfig`: what stands under `quantization_config` in config.json, for diffusers and transformers alike."""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin as DiffusersConfigMixin
from pydantic import ValidationError
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersConfigMixin

from quantdm.denoisers.analysis import analyse
from quantdm.denoisers.given_inputs import describe_inputs, parse_inputs
from quantdm.errors import QuantDMError, reason_of
from quantdm.recipe import ActivationSpec, Layer, Recipe, load_recipe
from quantdm.schemes import QuantConfig

EXPORT_VERSION = 2


class QuantizationMethod(StrEnum):
    """The name under which diffusers and transformers know quantdm."""

    QUANTDM = "quantdm"


class QuantDMConfig(DiffusersConfigMixin, TransformersConfigMixin):
    """Ask `from_pretrained` to quantize with a recipe, or say what a saved model was quantized with.

    `QuantDMConfig(recipe=...)` quantizes on the fly. The copy in config.json is compact: the scheme of every layer
    stands in the header of the safetensors files.

    Args:
        recipe: a recipe, its file, or a config layer -> scheme; None in the config of a saved model.
        component: quantize by the rules of this component of the recipe, e.g. "text_encoder" (default: the denoiser's).
        activations: dynamic activation quantization, re-applied after loading (default: the recipe's).
        model: the model that the recipe is for (default: the recipe's).
        avg_bits: average bits per weight, for people who read config.json.
        version: of the export format.
        example_inputs: keyword arguments of one call of the denoiser, where its class and config do not tell them:
            tensors, or text such as "float32[2, 4, 64, 64]"; they travel with a saved model.
        future: keys that a later quantdm may write; ignored, as the version decides what can be read.

    Raises:
        QuantDMError: another version, or malformed activations.
    """

    def __init__(
        self,
        recipe: Recipe | QuantConfig | str | Path | None = None,
        activations: ActivationSpec | Mapping[str, Any] | None = None,
        model: str | None = None,
        avg_bits: float | None = None,
        version: int = EXPORT_VERSION,
        component: str | None = None,
        example_inputs: Mapping[str, Any] | None = None,
        **future: object,
    ) -> None:
        if version != EXPORT_VERSION:
            raise QuantDMError(
                f"quantization_config: got version {version!r}, expected {EXPORT_VERSION}; "
                "it was written by another quantdm"
            )
        if isinstance(recipe, (str, Path)):
            recipe = load_recipe(recipe)
        if component is not None:
            if not isinstance(recipe, Recipe):
                raise QuantDMError(f"component: got {component!r} without a recipe; expected recipe=... that has it")
            recipe = recipe.component(component)
        if isinstance(activations, Mapping):
            try:
                activations = ActivationSpec.model_validate(activations)
            except ValidationError as error:
                raise QuantDMError(f"quantization_config: {reason_of(error, 'activations')}") from None
        if isinstance(recipe, Recipe):
            activations = activations or recipe.activations
            model, avg_bits = model or recipe.model, avg_bits or recipe.avg_bits
        self.quant_method = QuantizationMethod.QUANTDM  # pyright: ignore[reportAttributeAccessIssue]
        self.recipe = recipe
        self.activations = activations
        self.model = model
        self.avg_bits = avg_bits
        self.version = version
        self.example_inputs = None if example_inputs is None else describe_inputs(example_inputs)

    @property
    def what(self) -> str:
        """How errors name the recipe."""
        return f"recipe for {self.model}" if self.model else "config"

    def schemes_for(self, layers: Iterable[Layer]) -> QuantConfig:
        """Return what an on-the-fly quantization is asked to do: layer name -> Scheme.

        Raises:
            QuantDMError: there is no recipe, or it does not fit the layers.
        """
        if self.recipe is None:
            raise QuantDMError(
                "quantization_config: has no recipe; pass QuantDMConfig(recipe=...) to quantize while loading"
            )
        return self.recipe.resolve(layers, what=self.what) if isinstance(self.recipe, Recipe) else self.recipe

    def tell_inputs(self, model: nn.Module) -> None:
        """Make the example inputs known for this model, if there are any: whoever traces it later needs none."""
        if self.example_inputs is not None:
            analyse(model, example_inputs=parse_inputs(self.example_inputs))

    def to_dict(self) -> dict[str, Any]:
        """Return what is written into config.json: compact, without the layers."""
        record: dict[str, Any] = {"quant_method": self.quant_method.value, "version": self.version}
        if self.activations is not None:
            record["activations"] = self.activations.model_dump(mode="json")
        optional = {"model": self.model, "avg_bits": self.avg_bits, "example_inputs": self.example_inputs}
        return record | {key: value for key, value in optional.items() if value is not None}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return `to_dict()`: transformers prints the difference to the defaults, which is all there is."""
        return self.to_dict()
