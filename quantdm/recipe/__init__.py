"""The recipe: the chosen config with activations, correction and where it comes from."""

from collections.abc import Collection, Iterable

from quantdm.recipe.activations import ActivationScheme, ActivationSpec
from quantdm.recipe.calibration import CalibrationSpec
from quantdm.recipe.joint import joint_config, joint_rules, split_name
from quantdm.recipe.matching import match_weights
from quantdm.recipe.operations import bit_operations, factor_bits
from quantdm.recipe.provenance import PUBLISHED_INSIGHT, Provenance
from quantdm.recipe.reading import load_recipe
from quantdm.recipe.rules import Layer, check_names, pattern_matcher
from quantdm.recipe.schema import (
    ORIGINAL,
    RECIPE_VERSION,
    Recipe,
    Rules,
    check_recipe_path,
    recipe_schema,
    weights_digest,
)
from quantdm.recipe.tables import is_table
from quantdm.schemes import QuantConfig


def check_layers(
    config: QuantConfig, layer_names: Iterable[str], *, tables: Collection[str] = (), what: str = "recipe"
) -> None:
    """Check that a config covers exactly the layers of a denoiser, and perhaps some of its embedding tables.

    Raises:
        QuantDMError: names the first layers that differ.
    """
    check_names([name for name in config if name not in tables], list(layer_names), what=what)


__all__ = [
    "ORIGINAL",
    "PUBLISHED_INSIGHT",
    "RECIPE_VERSION",
    "ActivationScheme",
    "ActivationSpec",
    "CalibrationSpec",
    "Layer",
    "Provenance",
    "Recipe",
    "Rules",
    "bit_operations",
    "check_layers",
    "check_recipe_path",
    "factor_bits",
    "is_table",
    "joint_config",
    "joint_rules",
    "load_recipe",
    "match_weights",
    "pattern_matcher",
    "recipe_schema",
    "split_name",
    "weights_digest",
]
