"""What the outside sees where a dense weight used to be."""

from typing import Any, Protocol

import torch
from torch import nn

from quantdm.errors import QuantDMError


class Packed(Protocol):
    """What the view needs of a packed layer."""

    weight_dtype: torch.dtype
    weight_shape: tuple[int, ...]
    packed: nn.Parameter
    scheme: Any
    split: int | None

    def dequantize(self) -> torch.Tensor:
        """Decode the weight."""
        ...


_REFUSED = (
    "a packed weight cannot be changed in place (fusing a LoRA does): use quantdm.fuse_lora(pipe), dequantize() the "
    "model first, or keep it un-fused (unfuse_lora() takes back what was fused before)"
)


def _dense(value: Any) -> Any:
    if isinstance(value, WeightView):
        return value.dense()
    if isinstance(value, (tuple, list)):
        return type(value)(_dense(v) for v in value)
    return value


class WeightView:
    """Stands for the weight of a packed layer: `dtype`, `device` and `shape` cost nothing, anything else decodes it.

    Attention processors and PEFT ask for `.weight.dtype` and `.weight.device` at every call. Any torch function takes
    the view as an argument; writing through it is refused.
    """

    __slots__ = ("_layer",)

    def __init__(self, layer: Packed) -> None:
        object.__setattr__(self, "_layer", layer)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weight decodes to."""
        return self._layer.weight_dtype

    @property
    def device(self) -> torch.device:
        """Where the bytes are and the weight will be."""
        return self._layer.packed.device

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense weight."""
        return torch.Size(self._layer.weight_shape)

    @property
    def ndim(self) -> int:
        """The number of dimensions of the dense weight."""
        return len(self._layer.weight_shape)

    @property
    def requires_grad(self) -> bool:
        """Always False: codes are not trained."""
        return False

    @property
    def is_meta(self) -> bool:
        """Whether the bytes have not been loaded yet."""
        return self._layer.packed.is_meta

    @property
    def _is_hf_initialized(self) -> bool:
        """Whether the bytes came from a checkpoint: transformers initializes what did not, in place."""
        return getattr(self._layer.packed, "_is_hf_initialized", False)

    def size(self, dim: int | None = None) -> torch.Size | int:
        """The shape, or one of its entries."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """The number of weights (not of bytes)."""
        return self.shape.numel()

    @property
    def data(self) -> "WeightView":
        """The view itself, so that writing through `.data` is refused too."""
        return self

    @property
    def packed(self) -> torch.Tensor:
        """The bytes that it stands for."""
        return self._layer.packed.data

    def is_of_layer_like(self, layer: Packed) -> bool:
        """Tell whether the bytes mean in that layer what they mean in the one of this view."""
        own = self._layer
        return (own.scheme, own.weight_shape, own.split) == (layer.scheme, layer.weight_shape, layer.split)

    def dense(self) -> torch.Tensor:
        """Decode the weight."""
        return self._layer.dequantize()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], WeightView)
        if in_place or isinstance((kwargs or {}).get("out"), WeightView):
            raise QuantDMError(_REFUSED)
        return func(*_dense(args), **{key: _dense(value) for key, value in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # libraries mark tensors with private attributes: a packed weight has none
            raise AttributeError(name)
        if name.endswith("_") and hasattr(torch.Tensor, name):
            raise QuantDMError(_REFUSED)
        return getattr(self.dense(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise QuantDMError(_REFUSED)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Be copied and pickled as the decoded tensor."""
        return self.dense().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return f"WeightView({self._layer.scheme}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def _read(name: str) -> Any:
    def operator(self: WeightView, *args: Any) -> Any:
        return getattr(self.dense(), name)(*_dense(args))

    return operator


def _refuse(self: WeightView, *args: Any) -> Any:
    raise QuantDMError(_REFUSED)


# Python looks operators up on the class, past __getattr__.
for _name in ("add", "sub", "mul", "truediv", "matmul", "pow"):
    setattr(WeightView, f"__{_name}__", _read(f"__{_name}__"))
    setattr(WeightView, f"__r{_name}__", _read(f"__r{_name}__"))
    setattr(WeightView, f"__i{_name}__", _refuse)
for _name in ("neg", "getitem", "len", "iter"):
    setattr(WeightView, f"__{_name}__", _read(f"__{_name}__"))
WeightView.__setitem__ = _refuse  # type: ignore[attr-defined]
