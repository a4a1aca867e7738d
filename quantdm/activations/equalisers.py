"""The powers of two by which an equalised scheme divides channels: those of the layer's weight, else the spec's."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from quantdm.denoisers.inventory import LayerRecord
from quantdm.errors import QuantDMError
from quantdm.modules import PackedLayer
from quantdm.quantizers.equaliser import from_letters
from quantdm.recipe import ActivationScheme, ActivationSpec


def own_exponents(layer: nn.Module) -> Tensor | None:
    """Return the exponents of a layer with an equalised weight, int8 [C_in / groups]; None: its weight is not."""
    return layer.exponents if isinstance(layer, PackedLayer) else None


def given_exponents(
    denoiser: nn.Module,
    spec: ActivationSpec,
    records: Iterable[LayerRecord],
    schemes: Mapping[str, ActivationScheme | None],
) -> dict[str, Tensor]:
    """Return the exponents of the layers that are equalised and whose weight is not, int8 [C_in / groups].

    Raises:
        QuantDMError: the spec has none for such a layer, or those of another one.
    """
    found = {}
    for record in records:
        scheme, layer = schemes[record.name], denoiser.get_submodule(record.name)
        if scheme is None or not scheme.equalised or (isinstance(layer, PackedLayer) and layer.scheme.equalised):
            continue
        letters = spec.equalisers.get(record.name)
        if letters is None:
            raise QuantDMError(
                f"activations: {record.name} is {scheme}, and neither its weight nor the spec has an equaliser; "
                "quantdm.choose_activations finds one, or give the weight a scheme with -equalised50"
            )
        if len(letters) != record.shape[1]:
            raise QuantDMError(
                f"activations: the equaliser of {record.name} has {len(letters)} letters, expected {record.shape[1]}, "
                "one per input channel; it is another model's"
            )
        found[record.name] = from_letters(letters)
    return found
