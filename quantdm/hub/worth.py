"""Refuse recipes in which a scheme costs more bits than it saves."""

from collections.abc import Mapping
from typing import Any

from quantdm.errors import QuantDMError
from quantdm.hub.plan import plan_recipe
from quantdm.hub.quantize import model_layers
from quantdm.quantizers.worth import bits_of, is_wasteful
from quantdm.recipe import Recipe
from quantdm.schemes import ORIGINAL_BITS


def check_worth(pipe: Any, recipe: Recipe, example_inputs: Mapping[str, Any] | None = None) -> None:
    """Check that no scheme of a recipe costs more bits on its layer than it saves there (see `is_wasteful`).

    Args:
        pipe: a pipeline or a lone network, perhaps on the meta device.
        recipe: for it.
        example_inputs: as for `apply_recipe`.

    Raises:
        QuantDMError: how many schemes do, and the first with its figure; the recipe does not fit.
    """
    found = []
    for plan in plan_recipe(pipe, recipe, example_inputs=example_inputs):
        for layer in model_layers(plan.model):
            scheme = plan.schemes.get(layer.name)
            if scheme is not None and is_wasteful(layer.shape, scheme, layer.split):
                found.append((layer.name, scheme, bits_of(layer.shape, scheme, layer.split)))
    if found:
        name, scheme, bits = found[0]
        raise QuantDMError(
            f"recipe for {recipe.model}: {len(found)} layers have a scheme that costs more bits than it saves, first "
            f"{name}: {scheme} takes {bits:.2f} bits per weight there, {bits - scheme.bits:.2f} of them for tables and "
            f"scales, of {ORIGINAL_BITS}; choose another scheme, or insist (--insist)"
        )
