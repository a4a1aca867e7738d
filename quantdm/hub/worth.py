"""Refuse recipes in which a scheme costs more bits than it saves."""

from collections.abc import Mapping, Sequence
from typing import Any

from quantdm.errors import QuantDMError
from quantdm.hub.plan import Plan, plan_recipe
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
    check_plans(plan_recipe(pipe, recipe, example_inputs=example_inputs))


def check_plans(plans: Sequence[Plan]) -> None:
    """Check that no scheme that is planned costs more bits on its layer than it saves there.

    Raises:
        QuantDMError: as `check_worth`.
    """
    found = []
    for plan in plans:
        for layer in model_layers(plan.model):
            scheme = plan.schemes.get(layer.name)
            if scheme is not None and is_wasteful(layer.shape, scheme, layer.split):
                found.append((plan.config.what, layer.name, scheme, bits_of(layer.shape, scheme, layer.split)))
    if found:
        what, name, scheme, bits = found[0]
        raise QuantDMError(
            f"{what}: {len(found)} layers have a scheme that costs more bits than it saves, first "
            f"{name}: {scheme} takes {bits:.2f} bits per weight there, {bits - scheme.bits:.2f} of them for tables and "
            f"scales, of {ORIGINAL_BITS}; choose another scheme, or insist (insist=True, --insist)"
        )
