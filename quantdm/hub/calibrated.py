"""Recipes with calibrated schemes: the pipeline itself is run in full precision for the inputs of its layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from quantdm.activations.calibration import calibrate
from quantdm.errors import QuantDMError
from quantdm.hub.plan import Plan, plan_recipe
from quantdm.hub.quantize import Bank
from quantdm.pipelines.parts import find_denoisers
from quantdm.quantizers import QuantizedWeight
from quantdm.recipe import CalibrationSpec, Recipe
from quantdm.recipe.joint import joint_prefix
from quantdm.schemes import Scheme


@dataclass(frozen=True)
class PackedBank:
    """Weights that are quantized already, under joint names."""

    weights: Mapping[str, QuantizedWeight]

    def get(self, layer_name: str, scheme: Scheme) -> QuantizedWeight:
        """Return the layer's weight under the one scheme that it has."""
        return self.weights[layer_name]

    def other(self, parameter_name: str) -> Tensor | None:
        """Leave what is not quantized as it is."""
        return None


def calibrated_layers(plan: Plan) -> list[str]:
    """Return the layers of a plan whose schemes need the inputs of the layer, and that no bank has."""
    if plan.bank is not None:
        return []
    return [name for name, scheme in plan.schemes.items() if scheme is not None and scheme.calibration is not None]


def check_calibration(pipe: Any, plans: Sequence[Plan], spec: CalibrationSpec | None) -> None:
    """Check, before anything is run, that calibrated schemes can be calibrated.

    Raises:
        QuantDMError: a model without a pipeline, or one that is no denoiser; or nothing says on what to calibrate.
    """
    wanted = {id(plan.model): names for plan in plans if (names := calibrated_layers(plan))}
    first = next((names[0] for names in wanted.values()), "")
    if wanted and isinstance(pipe, nn.Module):
        raise QuantDMError(
            f"{first}: its scheme is calibrated on what a pipeline feeds the layer, got only a {type(pipe).__name__}; "
            "apply the recipe to the pipeline, or pass a bank"
        )
    if wanted and spec is None:
        raise QuantDMError(
            f"{first}: its scheme is calibrated, and the recipe does not say on what; pass "
            "calibration=CalibrationSpec(protocol=...), on the command line --protocol"
        )
    if wanted and not wanted.keys() <= {id(model) for model in find_denoisers(pipe).values()}:
        raise QuantDMError(f"{first}: only denoisers can be calibrated; give the other components other schemes")


def with_calibration(pipe: Any, plans: Sequence[Plan], spec: CalibrationSpec | None) -> list[Plan]:
    """Return the plans, those with calibrated schemes with the moments of their layers on the pipeline.

    Raises:
        QuantDMError: as `check_calibration`, or the pipeline cannot make these images.
    """
    check_calibration(pipe, plans, spec)
    wanted = {id(plan.model): names for plan in plans if (names := calibrated_layers(plan))}
    if not wanted or spec is None:
        return list(plans)
    parts = {name: model for name, model in find_denoisers(pipe).items() if id(model) in wanted}
    moments = calibrate(pipe, spec, {name: wanted[id(model)] for name, model in parts.items()})
    own = {id(model): moments[name] for name, model in parts.items()}
    return [
        replace(plan, moments=own[id(plan.model)], sweeps=spec.sweeps) if id(plan.model) in own else plan
        for plan in plans
    ]


def packed_bank(pipe: Any, recipe: Recipe, example_inputs: Mapping[str, Any] | None) -> Bank:
    """Quantize the denoisers of a pipeline by a calibrated recipe and return their weights; the pipeline stays."""
    prefixes = {
        id(model): joint_prefix(name, number) for number, (name, model) in enumerate(find_denoisers(pipe).items())
    }
    found: dict[str, QuantizedWeight] = {}
    plans = plan_recipe(pipe, recipe, example_inputs=example_inputs)
    for plan in with_calibration(pipe, plans, recipe.calibration):
        prefix = prefixes.get(id(plan.model))
        if prefix is not None:
            found |= {prefix + name: weight for name, weight in plan.pack().items()}
    return PackedBank(found)
