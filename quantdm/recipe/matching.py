"""Weights in the coordinates of their inputs: what integers can multiply is rotated, or equalised, on both sides."""

from collections.abc import Mapping

from quantdm.recipe.activations import ActivationScheme
from quantdm.schemes import QuantConfig, Scheme, Share

USUAL_SHARE: Share = 50  # both sides have few bits: the spread is shared evenly (SmoothQuant's own choice)


def match_weights(
    config: QuantConfig, activations: Mapping[str, ActivationScheme | None], *, share: Share = USUAL_SHARE
) -> QuantConfig:
    """Return a config whose quantized weights lie in the coordinates in which the inputs of their layers are rounded.

    Args:
        config: schemes of weights.
        activations: those of inputs, by layer (`ActivationSpec.resolve`).
        share: how much of the spread of equalised inputs moves into the weight, in per cent.

    A weight is equalised by the moments of its inputs: one without calibration stays as it is, and its layer simulated.
    """
    return QuantConfig({name: _matched(scheme, activations.get(name), share) for name, scheme in config.items()})


def _matched(scheme: Scheme | None, inputs: ActivationScheme | None, share: Share) -> Scheme | None:
    if scheme is None or inputs is None:
        return scheme
    equalised = share if inputs.equalised and scheme.calibration is not None else None
    return scheme.model_copy(update={"hadamard": inputs.hadamard, "equalised": equalised})
