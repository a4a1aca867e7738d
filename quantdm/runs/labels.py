"""A recipe as it is measured: one scheme for every layer of the denoisers."""

from collections.abc import Iterable, Mapping, Sequence

from quantdm.errors import QuantDMError
from quantdm.quantizers import count_bits
from quantdm.recipe import CalibrationSpec, Layer, Recipe, joint_config
from quantdm.runs.run import RunSettings
from quantdm.schemes import ORIGINAL_BITS, Scheme
from quantdm.surrogates import SearchSpace


def labels_of(recipe: Recipe, layers: Iterable[Layer], parts: Sequence[str]) -> dict[str, str | None]:
    """Return layer name -> label of a recipe, its patterns, types and default resolved (None: stays as it is).

    Args:
        layers: those of all denoisers, under joint names.
        parts: the denoisers, the main one first.

    Raises:
        QuantDMError: the recipe does not fit the layers, or quantizes further parts of the pipeline.
    """
    further = [name for name in recipe.components if name not in parts]
    if further:
        raise QuantDMError(
            f"recipe for {recipe.model}: also quantizes {', '.join(further)}, which a run does not measure; expected "
            "rules for the denoiser alone: take its components out"
        )
    return joint_config(recipe, layers, parts).to_labels()


def calibration_of(settings: RunSettings, labels: Mapping[str, str | None]) -> CalibrationSpec | None:
    """Return what a configuration of a run was calibrated on; None where no scheme of it is calibrated."""
    schemes = {Scheme.parse(label) for label in labels.values() if label is not None}
    return settings.calibration if any(scheme.calibration is not None for scheme in schemes) else None


def label_bits(space: SearchSpace, labels: Mapping[str, str | None]) -> int:
    """Return the exact bits of a configuration's quantizable weights, of which its schemes need not be options."""
    bits = 0
    for layer in space.layers:
        label = labels[layer.name]
        if label is None:
            bits += layer.num_weights * ORIGINAL_BITS
        else:
            bits += count_bits(layer.shape, Scheme.parse(label), layer.split)
    return bits
