"""Values on the meta device: of small tensors that follow from no weight and no image (masks, ids, positions).

Many denoisers read such tensors in Python: `int(mask.sum())`, `lengths.tolist()`, `x[mask]`. On the meta device they
have no values, so what is computed from constants alone is computed a second time, on the CPU, and handed out when it
is read.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from quantdm.denoisers.known_results import KnownResults

MAX_ELEMENTS = 1 << 16  # what is larger is data, or a table that nothing reads one by one
_EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class Constants:
    """Knows the values of tensors on the meta device that depend on constants only."""

    def __init__(self) -> None:
        self._values: dict[int, Tensor] = {}
        self._alive: list[Tensor] = []  # ids stay unique while their tensors live
        self._results = KnownResults()

    def lift(self, value: Tensor) -> Tensor:
        """Return a tensor on the meta device of which this value is known."""
        tensor = value.to("meta")
        self._set(tensor, value)
        return tensor

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what an operation returns on the meta device, and remember the values of its results if it has any.

        Raises:
            RuntimeError, NotImplementedError: it asks for values that depend on weights or images.
        """
        operands = list(tensors_of((args, kwargs)))
        on_meta = any(t.is_meta for t in operands) or _is_meta(kwargs.get("device"))
        if not on_meta:
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        if name in _INDEXED:  # a mask of known values becomes the positions that it lets through
            args = (args[0], self._positions(args[1]), *args[2:])
        known = all(self._of(t) is not None for t in operands) and torch.Tag.nondeterministic_seeded not in func.tags
        try:
            out = self._results.call(func, to_meta(args), to_meta(kwargs))
        except (RuntimeError, NotImplementedError):
            if not known:
                raise
            return self._read(func, args, kwargs)
        if name == "topk" and not known:
            self._route(args[0], out[1])
        elif func._schema.is_mutable and not known:
            self._forget(args[0])
        elif known and all(t.numel() <= MAX_ELEMENTS for t in tensors_of(out)):
            values = self._compute(func, name, args, kwargs)
            for tensor, value in zip(tensors_of(out), tensors_of(values), strict=True):
                if tensor.is_meta:
                    self._set(tensor, value)
        return out

    def _compute(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = {key: "cpu" if _is_meta(value) else value for key, value in kwargs.items()}
        values = func(*self._valued(args), **self._valued(kwargs))
        return values.zero_() if name in _EMPTY else values

    def _read(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return results whose shape or value follows from values: numbers and CPU tensors as such, the rest lifted."""
        values = self._compute(func, "", args, kwargs)
        if str(kwargs.get("device", "meta")) == "cpu":
            return values.clone()
        return map_tensors(values, self.lift)

    def _route(self, scores: Tensor, chosen: Tensor) -> None:
        """Let a router, whose choice depends on weights, send some token to every expert, so that all take part."""
        if chosen.numel() <= MAX_ELEMENTS:
            self._set(chosen, (torch.arange(chosen.numel()) % scores.shape[-1]).reshape(chosen.shape))

    def _positions(self, indices: Any) -> list[Any]:
        found: list[Any] = []
        for index in indices:
            value = None if index is None else self._of(index)
            if value is not None and value.dtype in (torch.bool, torch.uint8):
                found += [self.lift(position) for position in value.nonzero().unbind(1)]
            else:
                found.append(index)
        return found

    def _of(self, tensor: Tensor) -> Tensor | None:
        return self._values.get(id(tensor)) if tensor.is_meta else tensor

    def _set(self, tensor: Tensor, value: Tensor) -> None:
        self._values[id(tensor)] = value
        self._alive.append(tensor)

    def _valued(self, tree: Any) -> Any:
        return map_tensors(tree, self._of)

    def _forget(self, written: Any) -> None:
        """Forget a tensor that data was written into, and every view of it."""
        value = self._values.get(id(written))
        if value is None:
            return
        storage = value.untyped_storage()._cdata
        for key in [key for key, other in self._values.items() if other.untyped_storage()._cdata == storage]:
            del self._values[key]


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested lists, tuples and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_of(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors_of(value)


def map_tensors(tree: Any, change: Any) -> Any:
    """Return nested lists, tuples and dicts with every tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [map_tensors(value, change) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def to_meta(tree: Any) -> Any:
    """Return nested lists, tuples and dicts with every tensor on the meta device."""
    return map_tensors(tree, lambda t: t if t.is_meta else t.to("meta"))


def _is_meta(device: Any) -> bool:
    return device is not None and str(device) == "meta"
