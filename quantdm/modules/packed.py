"""Linear and convolution layers whose weight stays packed; it is decoded when the layer runs.

The stored tensors of a `QuantizedWeight` lie one behind the other in ONE frozen uint8 parameter, `packed`. Bytes are
never cast (`torch_dtype=`, disk offload and `.to(dtype)` cast every floating tensor they meet), they move as one piece
under sequential and group offload, and one tensor per layer keeps the checkpoint header small.
"""

import threading
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from quantdm.errors import QuantDMError
from quantdm.modules.blob import join_tensors, split_blob
from quantdm.modules.int8 import Int8Weight, int8_form, moved
from quantdm.modules.view import WeightView
from quantdm.quantizers import QuantizedWeight
from quantdm.schemes import Scheme

Residency = Literal["packed", "int8", "dense"]
RESIDENCIES: tuple[str, ...] = get_args(Residency)

_scratch = threading.local()


def _scratch_out(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
    """Return a reusable CPU buffer: fresh large temporaries cost page faults.

    Only without autograd, which would keep the weight for the backward pass, and never between inference modes.
    """
    if torch.is_grad_enabled():
        return None
    key = (dtype, torch.is_inference_mode_enabled())
    buffers: dict[Any, torch.Tensor] = _scratch.__dict__.setdefault("buffers", {})
    count = torch.Size(shape).numel()
    if key not in buffers or buffers[key].numel() < count:
        buffers[key] = torch.empty(count, dtype=dtype)
    return buffers[key][:count].view(shape)


@torch.library.custom_op("quantdm::decode", mutates_args=())
def _decode(
    packed: torch.Tensor, label: str, shape: list[int], split: int | None, original: torch.dtype, dtype: torch.dtype
) -> torch.Tensor:
    """Decode a blob; one opaque node under torch.compile, where decoding in place of it would break the graph."""
    scheme = Scheme.parse(label)
    tensors = split_blob(packed, tuple(shape), scheme, split)
    return QuantizedWeight(scheme, tuple(shape), split, original, tensors).dequantize(dtype=dtype)


@_decode.register_fake
def _(
    packed: torch.Tensor, label: str, shape: list[int], split: int | None, original: torch.dtype, dtype: torch.dtype
) -> torch.Tensor:
    return packed.new_empty(shape, dtype=dtype)


class PackedLayer(nn.Module):
    """What all packed layers share: the bytes, what they mean, and how they become a dense weight again.

    It behaves as the torch layer with the dense weight `dequantize()` of dtype `weight_dtype` would; that dtype follows
    `.to(dtype)` on the layer, the bytes do not.
    """

    packed: nn.Parameter
    scheme: Scheme
    label: str
    weight_shape: tuple[int, ...]
    split: int | None
    original_dtype: torch.dtype
    weight_dtype: torch.dtype
    _kept: torch.Tensor | Int8Weight | None  # what is held beside the bytes, see `residency`

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a torch layer when called like one: PEFT builds the two convolutions of a LoRA as `type(layer)(...)`."""
        return torch_class(cls)(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def pack_(self, quantized: QuantizedWeight, weight_dtype: torch.dtype, device: torch.device) -> None:
        """Hold this quantized weight from now on."""
        shape, scheme, split = quantized.shape, quantized.scheme, quantized.split
        blob = join_tensors(quantized.tensors, shape, scheme, split).to(device)
        self.describe_(scheme, shape, split, quantized.dtype, weight_dtype=weight_dtype, packed=blob)

    def describe_(
        self,
        scheme: Scheme,
        shape: tuple[int, ...],
        split: int | None,
        original_dtype: torch.dtype,
        *,
        weight_dtype: torch.dtype,
        packed: torch.Tensor,
    ) -> None:
        """Say what the bytes `packed` (perhaps still on the meta device) mean."""
        self.scheme, self.label, self.weight_shape, self.split = scheme, scheme.label, tuple(shape), split
        self.original_dtype, self.weight_dtype = original_dtype, weight_dtype
        self.packed = nn.Parameter(packed, requires_grad=False)
        self._kept = None

    @property
    def quantized(self) -> QuantizedWeight:
        """The layer's weight as a `QuantizedWeight` that looks into the packed bytes without copying them."""
        tensors = split_blob(self.packed.data, self.weight_shape, self.scheme, self.split)
        return QuantizedWeight(self.scheme, self.weight_shape, self.split, self.original_dtype, tensors)

    def dequantize(self, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Decode the weight into a new tensor of `dtype` (default: `weight_dtype`)."""
        return self.quantized.dequantize(dtype=dtype or self.weight_dtype)

    def dense_weight(self) -> torch.Tensor:
        """Return the weight for one forward pass: kept in dense residency, else decoded into a shared buffer.

        Raises:
            QuantDMError: the bytes were moved by an offload hook, what is kept beside them was not.
        """
        kept = self._kept
        if kept is not None and kept.device != self.packed.device:
            raise QuantDMError(
                f"{self.residency} residency: the weight is kept on {kept.device}, but its bytes were offloaded and "
                f"came back on {self.packed.device}; set_residency(model, 'packed') before offloading"
            )
        if isinstance(kept, torch.Tensor):
            return kept
        if torch.compiler.is_compiling():
            if kept is not None:
                return kept.traced(self.weight_dtype).view(self.weight_shape)
            meaning = (self.label, list(self.weight_shape), self.split, self.original_dtype, self.weight_dtype)
            return _decode(self.packed, *meaning)
        out = _scratch_out(self.weight_shape, self.weight_dtype) if self.packed.device.type == "cpu" else None
        if kept is None:
            return self.quantized.dequantize(dtype=self.weight_dtype, out=out)
        if out is None:
            out = torch.empty(self.weight_shape, dtype=self.weight_dtype, device=kept.device)
        return kept.decode(out)

    @property
    def residency(self) -> Residency:
        """The form in which the weight is kept beside the bytes."""
        return "packed" if self._kept is None else "dense" if isinstance(self._kept, torch.Tensor) else "int8"

    def keep_(self, residency: Residency) -> None:
        """Keep the weight in another form beside the bytes, or in none; int8 stays packed where it is not exact."""
        with torch.inference_mode(False), torch.no_grad():  # what is kept must be usable under autograd
            self._kept = {"packed": lambda: None, "int8": self._int8, "dense": self.dequantize}[residency]()

    def _int8(self) -> Int8Weight | None:
        return int8_form(self.quantized)

    @property
    def weight(self) -> WeightView:
        """What others see as the weight: dtype, device and shape at once, values decoded when they are asked for."""
        return WeightView(self)

    @weight.setter
    def weight(self, value: object) -> None:
        raise QuantDMError(f"weight of a {self.scheme} layer: cannot be assigned; dequantize() the model first")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; a dense `weight` is refused."""
        if name == "weight":
            raise QuantDMError(f"weight of a {self.scheme} layer: cannot be assigned; dequantize() the model first")
        super().register_parameter(name, param)

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLayer":
        if fn(torch.empty(0, dtype=torch.uint8)).dtype != torch.uint8:
            raise QuantDMError("packed layer: .type() would cast its bytes; use .to(dtype)")
        super()._apply(fn, recurse)
        before, self.weight_dtype = self.weight_dtype, fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        if isinstance(self._kept, torch.Tensor) and self.weight_dtype != before:
            self.keep_("dense")
        elif isinstance(self._kept, torch.Tensor):
            self._kept = moved(self._kept, self.packed.device)
        elif self._kept is not None:
            self._kept = self._kept.to(self.packed.device)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self._kept is not None:  # it was made from the bytes before
            self.keep_(self.residency)

    def extra_repr(self) -> str:
        """Show the scheme behind the arguments of the torch layer."""
        kept = "" if self._kept is None else f", residency={self.residency}"
        return f"{super().extra_repr()}, scheme={self.scheme}{kept}"


class QuantLinear(PackedLayer, nn.Linear):
    """`nn.Linear` with a packed weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return input @ weight.T + bias; [..., C_in] -> [..., C_out]."""
        return F.linear(input, self.dense_weight(), self.bias)


class _QuantConv(PackedLayer):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, self.dense_weight(), self.bias)  # type: ignore[operator]


class QuantConv1d(_QuantConv, nn.Conv1d):
    """`nn.Conv1d` with a packed weight."""


class QuantConv2d(_QuantConv, nn.Conv2d):
    """`nn.Conv2d` with a packed weight."""


class QuantConv3d(_QuantConv, nn.Conv3d):
    """`nn.Conv3d` with a packed weight."""


def torch_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a packed class was made from."""
    return next(base for base in cls.__mro__ if issubclass(base, nn.Module) and not issubclass(base, PackedLayer))


def packed_layers(denoiser: nn.Module) -> dict[str, PackedLayer]:
    """Return the packed layers of a model by dotted name, in `named_modules` order."""
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, PackedLayer)}
