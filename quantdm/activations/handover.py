"""What a layer gets in place of its input: rounded values, or their integers if it multiplies those itself."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantdm.activations.codes import Given, Grid, code_input, new_codes
from quantdm.activations.equalisers import own_exponents
from quantdm.activations.rounding import Dims, quantize_activations
from quantdm.denoisers.inventory import LayerRecord
from quantdm.modules import PackedLayer
from quantdm.modules.coded import CodedInput
from quantdm.modules.execution import say_once
from quantdm.modules.measured import measure, remembered
from quantdm.recipe import ActivationScheme

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def shared_dims(record: LayerRecord, scheme: ActivationScheme, ndim: int) -> Dims:
    """Return the dimensions of a layer's input that share a scale (`ActivationScheme`, granularity)."""
    linear, pixel = record.kind == "linear", all(size == 1 for size in record.shape[2:])
    if scheme.granularity == "tensor":
        return tuple(range(ndim))
    if scheme.granularity == "map" and not linear:
        return tuple(range(2, ndim))
    if scheme.granularity in ("token", "map") and (linear or pixel):
        return -1 if linear else 1
    return tuple(range(1, ndim)) if ndim > 1 else 0


def quantize_input(
    x: Tensor, record: LayerRecord, scheme: ActivationScheme, given: Given = None, exponents: Tensor | None = None
) -> Tensor:
    """Return the input of a layer as a scheme rounds it; the halves of a concatenated long skip each by themselves."""
    channel = -1 if record.kind == "linear" else 1
    dims = shared_dims(record, scheme, x.dim())
    if record.split is None:
        return quantize_activations(x, scheme, dims=dims, channel=channel, given=given, exponents=exponents)
    parts = x.tensor_split([record.split], dim=channel)
    own = (None, None) if exponents is None else exponents.tensor_split([record.split])
    halves = [
        quantize_activations(part, scheme, dims=dims, channel=channel, given=given, exponents=half)
        for part, half in zip(parts, own, strict=True)
    ]
    return torch.cat(halves, dim=channel)


def input_for(
    module: nn.Module,
    x: Tensor,
    record: LayerRecord,
    scheme: ActivationScheme,
    given: Given,
    exponents: Tensor | None = None,
) -> Tensor | CodedInput:
    """Return the input of a layer as it takes it: in integers if it can multiply them and the scheme allows it.

    Gradients pass through the simulation alone, and compiled graphs hold it. An equalised weight has exponents of its
    own, which count instead of those that are given.
    """
    if scheme.equalised and (own := own_exponents(module)) is not None:
        exponents = own
    if not isinstance(module, PackedLayer) or module.obstacle or not _runs_in_integers(module, x):
        return quantize_input(x, record, scheme, given, exponents)
    if reason := _no_single_grid(module, record, scheme, x.dim()):
        say_once(reason)
        return quantize_input(x, record, scheme, given, exponents)
    dims, channel = shared_dims(record, scheme, x.dim()), -1 if record.kind == "linear" else 1
    grid = Grid(dims, channel, record.split, given, exponents)
    if module.residency == "auto":
        seen = (x.shape, x.dtype, scheme, torch.get_num_threads())
        if seen not in module.pays:
            module.pays[seen] = _pays(module, x, record, scheme, grid)
        if not module.pays[seen]:
            return quantize_input(x, record, scheme, given, exponents)
    return code_input(x, scheme, grid)


def _runs_in_integers(module: PackedLayer, x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return x.dtype in FLOATS and x.numel() > 0 and not module.packed.is_meta and module.packed.device == x.device


def _no_single_grid(module: PackedLayer, record: LayerRecord, scheme: ActivationScheme, ndim: int) -> str | None:
    """Say why one product cannot compute what a scheme means for this layer; None: it can."""
    if scheme.outliers is not None:
        return f"{scheme} inputs have outliers apart"
    if scheme.hadamard != module.scheme.hadamard or (scheme.hadamard and getattr(module, "groups", 1) > 1):
        return f"rotated weights need rotated inputs and the other way round, got {module.scheme} and {scheme}"
    if scheme.equalised != (module.scheme.equalised is not None):
        return f"equalised weights need equalised inputs and the other way round, got {module.scheme} and {scheme}"
    if record.split != module.split:
        return "the halves of a long skip are those of other weights"
    if record.kind == "linear":
        return None
    pixel = record.shape[2:] == (1, 1)
    if ndim != 4 or (scheme.granularity == "map" and not pixel):
        return (
            f"{scheme} inputs of convolutions have a scale for every channel, which no integer product can factor out"
        )
    if scheme.granularity in ("token", "map") and pixel and not _meets_pixels(module):
        return "a pixel's scale cannot be factored out of a 1x1 convolution that is grouped or padded"
    return None


def _meets_pixels(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding == (0, 0)


def _pays(module: PackedLayer, x: Tensor, record: LayerRecord, scheme: ActivationScheme, grid: Grid) -> bool:
    """Whether integers are faster than the dense weight for this layer and shape: remembered, else measured now."""
    places = [getattr(module, name, None) for name in ("stride", "padding", "dilation", "groups")]
    split, bias = record.split, getattr(module, "bias", None) is not None
    key = f"{record.kind} {list(module.weight_shape)} {places} {split} {bias} {list(x.shape)} {x.dtype} {scheme}"
    key += f" rank {module.scheme.branch_rank}" if module.scheme.branch_rank else ""
    choice = remembered(key, x.device)
    if choice is None:
        ways: dict[str, Callable[[], Tensor]] = {
            "dense": lambda: module.forward(quantize_input(x, record, scheme, grid.given, grid.exponents)),
            "integer": lambda: module.forward(new_codes(x, scheme, grid)),
        }
        choice = measure(key, ways, x.device)
        module.settle_("integer" if choice == "integer" else "dense")
    return choice == "integer"
