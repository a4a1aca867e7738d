"""Linear and convolution layers whose weight stays packed; it is decoded when the layer runs.

The stored tensors of a `QuantizedWeight` lie one behind the other in ONE frozen uint8 parameter, `packed`. Bytes are
never cast (`torch_dtype=`, disk offload and `.to(dtype)` cast every floating tensor they meet), they move as one piece
under sequential and group offload, and one tensor per layer keeps the checkpoint header small.
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from quantdm.errors import QuantDMError
from quantdm.modules.blob import join_tensors, sparing_bytes, split_blob
from quantdm.modules.coded import CodedInput
from quantdm.modules.decoding import decode_bytes, decode_layer, new_handle
from quantdm.modules.execution import Product, new_product, obstacle_of, product_of, say_once
from quantdm.modules.int8 import Int8Weight, int8_form, moved
from quantdm.modules.scratch import scratch_out
from quantdm.modules.view import WeightView
from quantdm.quantizers import QuantizedWeight
from quantdm.schemes import Scheme

Residency = Literal["packed", "int8", "dense", "integer", "auto"]
RESIDENCIES: tuple[Residency, ...] = get_args(Residency)


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
    path: str  # where the layer is in the model that was quantized
    _handle: torch.Tensor  # under which a compiled graph finds the layer
    residency: Residency  # the form in which the weight is kept beside the bytes
    takes_codes: ClassVar[bool] = False  # whether `forward` knows what to do with a `CodedInput`
    _kept: torch.Tensor | Int8Weight | None  # what is held beside the bytes to decode from
    _product: Product | None  # what multiplies coded inputs, made when the first one comes
    _place: torch.device  # where that was decided
    obstacle: str | None  # why it cannot multiply them
    pays: dict[Any, bool]  # in auto residency: whether integers are faster, by what its input is

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
        self.path, self._handle = "", new_handle(self)
        self.keep_("packed")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only this process and this machine can use."""
        return {**self.__dict__, "_product": None}

    def __setstate__(self, state: Any) -> None:
        """Be another layer than the one that was copied."""
        super().__setstate__(state)
        self._handle = new_handle(self)

    @property
    def quantized(self) -> QuantizedWeight:
        """The layer's weight as a `QuantizedWeight` that looks into the packed bytes without copying them."""
        tensors = split_blob(self.packed.data, self.weight_shape, self.scheme, self.split)
        return QuantizedWeight(self.scheme, self.weight_shape, self.split, self.original_dtype, tensors)

    @property
    def exponents(self) -> torch.Tensor | None:
        """Those of the powers of two that its inputs are divided by, int8 [C_in / groups], if it is equalised."""
        return None if self.scheme.equalised is None else self.quantized.tensors["exponents"]

    def dequantize(self, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Decode the weight into a new tensor of `dtype` (default: `weight_dtype`)."""
        return self.quantized.dequantize(dtype=dtype or self.weight_dtype)

    def dense_weight(self, device: torch.device | None = None) -> torch.Tensor:
        """Return the weight for one forward pass: kept in dense residency, else decoded into a shared buffer.

        Args:
            device: where the bytes are, for a compiled graph, which then does not depend on how many they are.

        Raises:
            QuantDMError: the bytes were moved by an offload hook, what is kept beside them was not.
        """
        if torch.compiler.is_compiling():
            return self._traced_weight(device or self.packed.device)
        if self.residency == "auto" and not isinstance(self._kept, torch.Tensor):
            self._keep_dense()
        kept = self._kept
        if kept is not None and kept.device != self.packed.device:
            raise QuantDMError(
                f"{self.residency} residency: the weight is kept on {kept.device}, but its bytes were offloaded and "
                f"came back on {self.packed.device}; set_residency(model, 'packed') before offloading"
            )
        if isinstance(kept, torch.Tensor):
            return kept
        out = scratch_out(self.weight_shape, self.weight_dtype) if self.packed.device.type == "cpu" else None
        if kept is None:
            return self.quantized.dequantize(dtype=self.weight_dtype, out=out)
        if out is None:
            out = torch.empty(self.weight_shape, dtype=self.weight_dtype, device=kept.device)
        return kept.decode(out)

    def _traced_weight(self, device: torch.device) -> torch.Tensor:
        kept, shape = self._kept, list(self.weight_shape)
        if isinstance(kept, torch.Tensor):
            return kept
        if kept is not None:
            return kept.traced(self.weight_dtype).view(self.weight_shape)
        if torch.compiler.is_exporting():
            return decode_bytes(self.packed, self.label, shape, self.split, self.original_dtype, self.weight_dtype)
        return decode_layer(self._handle, shape, self.weight_dtype, device)

    def keep_(self, residency: Residency) -> None:
        """Keep the weight in another form beside the bytes, or in none; what has no such form takes the next best."""
        self.residency, self._kept, self._product, self.obstacle = residency, None, None, f"{residency} residency"
        self.pays = {}
        if residency in ("integer", "auto"):
            self._place = self.packed.device
            form = self._integers()
            self.obstacle = obstacle_of(self, form, self.split, self.packed.device)
            # A turned weight is not what its integers decode to.
            self._kept = form if self.scheme.is_in_place else None
        if residency == "int8" or (residency == "integer" and self.obstacle):
            with torch.inference_mode(False), torch.no_grad():
                self._kept = int8_form(self.quantized)
            self.residency = "packed" if self._kept is None else "int8"
        if residency == "dense" or (residency == "auto" and self.obstacle):
            self._keep_dense()

    def _integers(self) -> Int8Weight | None:
        """Return the int8 form in which the weight is multiplied: that of a turned weight, as its codes have it."""
        quantized = replace(self.quantized, scheme=self.scheme.in_place)
        with torch.inference_mode(False), torch.no_grad():
            return int8_form(quantized)

    def _keep_dense(self) -> None:
        with torch.inference_mode(False), torch.no_grad():  # what is kept must be usable under autograd
            self._kept = self.dequantize()

    def multiply(self, coded: CodedInput) -> torch.Tensor:
        """Return the output for an input in integers: that for its values, up to rounding.

        Only without an `obstacle`. Integers that could overflow, or meet an offloaded weight, are turned into values.
        """
        place = coded.parts[0].codes.device
        if place != self._place:
            say_once(f"{self.residency} residency was chosen on {self._place}, offloading brings weights to {place}")
            self._kept = self._product = None
            return self.forward(coded.values())  # type: ignore[return-value]
        if self._product is None:
            form = self._kept if isinstance(self._kept, Int8Weight) else self._integers()
            assert form is not None
            self._product = new_product(self, form)
            if isinstance(self._kept, Int8Weight):
                self._kept = None  # its codes are in the product now
        if not self._product.fits(coded):
            return self.forward(coded.values())
        return product_of(self, self._product, coded)  # type: ignore[arg-type]

    @property
    def held_bytes(self) -> int:
        """Bytes of the weight in memory in all its forms."""
        return sum(form.nbytes for form in (self.packed, self._kept, self._product) if form is not None)

    def settle_(self, on: Literal["dense", "integer"]) -> None:
        """Keep only what one of the two ways of `auto` residency needs."""
        self._kept, self._product = (None, self._product) if on == "integer" else (self._kept, None)

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
        place = self.packed.device.type
        super()._apply(sparing_bytes(fn), recurse)
        if self.residency in ("integer", "auto") and len({place, self.packed.device.type, "meta"}) == 3:
            self.keep_(self.residency)  # another kind of device has other operators
        before, self.weight_dtype = self.weight_dtype, fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        self._product, self._place = None, self.packed.device  # it is in the order of an operator of its device
        if isinstance(self._kept, torch.Tensor) and self.weight_dtype != before:
            self._keep_dense()
        elif isinstance(self._kept, torch.Tensor):
            self._kept = moved(self._kept, self.packed.device)
        elif self._kept is not None:
            self._kept = self._kept.to(self.packed.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._is_in_a_part(prefix):
            del destination[f"{prefix}packed"]
            destination[f"{prefix}weight"] = self.weight

    def _is_in_a_part(self, prefix: str) -> bool:
        """Tell whether a state dict is that of a part of the model (a block, this layer) and not of the whole.

        Parts are copied into other models, such as ControlNets (`new.block.load_state_dict(model.block.state_dict())`),
        which know `weight`; the view is decoded when it is copied. A whole model is stored as it is.
        """
        part = prefix.removesuffix(".")
        return part != self.path and (not part or self.path.endswith(f".{part}"))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        view = state_dict.get(f"{prefix}weight")
        if isinstance(view, WeightView) and view.is_of_layer_like(self):
            state_dict = {key: value for key, value in state_dict.items() if key != f"{prefix}weight"}
            state_dict[f"{prefix}packed"] = view.packed
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.residency != "packed":  # what is kept was made from the bytes before
            self.keep_(self.residency)

    def extra_repr(self) -> str:
        """Show the scheme behind the arguments of the torch layer."""
        kept = "" if self.residency == "packed" else f", residency={self.residency}"
        return f"{super().extra_repr()}, scheme={self.scheme}{kept}"


class QuantLinear(PackedLayer, nn.Linear):
    """`nn.Linear` with a packed weight."""

    takes_codes = True

    def forward(self, input: torch.Tensor | CodedInput) -> torch.Tensor:
        """Return input @ weight.T + bias; [..., C_in] -> [..., C_out]."""
        if isinstance(input, CodedInput):
            return self.multiply(input)
        return F.linear(input, self.dense_weight(input.device), self.bias)


class _QuantConv(PackedLayer):
    def forward(self, input: torch.Tensor | CodedInput) -> torch.Tensor:
        if isinstance(input, CodedInput):
            return self.multiply(input)
        return self._conv_forward(input, self.dense_weight(input.device), self.bias)  # type: ignore[operator]


class QuantConv1d(_QuantConv, nn.Conv1d):
    """`nn.Conv1d` with a packed weight."""


class QuantConv2d(_QuantConv, nn.Conv2d):
    """`nn.Conv2d` with a packed weight."""

    takes_codes = True


class QuantConv3d(_QuantConv, nn.Conv3d):
    """`nn.Conv3d` with a packed weight."""


def torch_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a packed class was made from."""
    return next(base for base in cls.__mro__ if issubclass(base, nn.Module) and not issubclass(base, PackedLayer))


def packed_layers(denoiser: nn.Module) -> dict[str, PackedLayer]:
    """Return the packed layers of a model by dotted name, in `named_modules` order."""
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, PackedLayer)}
