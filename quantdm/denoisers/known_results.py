"""Results on the meta device that are known already: blocks repeat, and an operation's shapes follow from its inputs'.

PyTorch computes the shapes of many operations in Python, a quarter of a millisecond each; a denoiser of fifty equal
blocks has thousands of them, and some hundred that differ.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Shape = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # size, strides, dtype


class KnownResults:
    """Calls operations on the meta device, each kind of call once; results that share memory are never kept."""

    def __init__(self) -> None:
        self._known: dict[Any, Shape | None] = {}  # None: not one fresh tensor

    def call(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what an operation returns; arguments are on the meta device."""
        key = (func, _kind_of(args), _kind_of(kwargs))
        try:
            known = self._known.get(key)
        except TypeError:  # an argument that cannot be compared
            return func(*args, **kwargs)
        if known is not None:
            size, strides, dtype = known
            return torch.empty_strided(size, strides, dtype=dtype, device="meta")
        out = func(*args, **kwargs)
        if key not in self._known:
            self._known[key] = _shape_of(func, out, args, kwargs)
        return out


def _kind_of(tree: Any) -> Any:
    """Return what decides the shapes of results, as something that can be compared."""
    if isinstance(tree, Tensor):
        return tuple(tree.shape), tree.stride(), tree.dtype
    if isinstance(tree, (list, tuple)):
        return (type(tree), *map(_kind_of, tree))
    if isinstance(tree, Mapping):
        return tuple((key, _kind_of(value)) for key, value in tree.items())
    return type(tree), tree  # True is no 1


def _shape_of(func: Any, out: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Shape | None:
    """Return what is to be known of a result; None where it is no tensor of its own on the meta device."""
    schema = func._schema
    if schema.is_mutable or any(each.alias_info is not None for each in schema.returns):
        return None
    if type(out) is not Tensor or not out.is_meta or out.layout != torch.strided:
        return None
    memory = out.untyped_storage()._cdata
    if any(given.untyped_storage()._cdata == memory for given in _tensors((args, kwargs))):
        return None  # an operation that does not say that it returns a view
    return tuple(out.shape), out.stride(), out.dtype


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else ()
    return [tensor for item in items for tensor in _tensors(item)]
