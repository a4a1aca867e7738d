"""What flows along every edge of a denoiser, and running it with full-precision tensors on some of them.

A forward is watched operation by operation. In full precision the tensors are kept that each node of the data flow
reads from another; later, under other weights, the same operations run, and those that an edge should carry in full
precision are put in the place of what was computed.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantdm.denoisers.assembly import assemble
from quantdm.denoisers.calls import Call, first_tensor, scoped
from quantdm.denoisers.constants import map_tensors, tensors_of
from quantdm.denoisers.graph import Graph
from quantdm.denoisers.trace import UNKNOWN, Trace, Tracer
from quantdm.denoisers.weights import weight_specs
from quantdm.errors import QuantDMError

Operand = tuple[int, int]  # which operation, which of its tensors
_SILENT = ("detach", "alias")  # torch inserts them or not, depending on who else holds a tensor


@dataclass(frozen=True)
class FlowEdge:
    """One edge of the data flow: names of its ends, and the edges of the graph that stand for it."""

    source: str
    target: str
    drawn: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Flow:
    """One call in full precision: its edges, and what every operation read along each of them."""

    call: Call
    graph: Graph
    edges: tuple[FlowEdge, ...]
    operations: tuple[str, ...]
    read: tuple[dict[Operand, Tensor], ...]  # of every edge

    def run(self, denoiser: nn.Module, carried: Collection[int]) -> Tensor:
        """Run the call again and return the output; the edges `carried` bring the tensors of full precision.

        Raises:
            QuantDMError: the denoiser takes another way than in full precision.
        """
        tensors = {operand: value for edge in carried for operand, value in self.read[edge].items()}
        mode = _Carrier(self.operations, tensors)
        with torch.no_grad(), mode:
            return first_tensor(denoiser(*self.call.args, **self.call.kwargs))


def record_flow(denoiser: nn.Module, call: Call) -> Flow:
    """Watch one call of a denoiser in full precision.

    It keeps every tensor of the forward in memory: take few images.
    """
    specs = weight_specs(denoiser)
    watcher = _Watcher(denoiser, specs)
    with torch.no_grad(), scoped(denoiser, watcher.scope), watcher:
        result = denoiser(*call.args, **call.kwargs)
    found = assemble(Trace(specs, tuple(watcher.ops), watcher.outputs_of(result), watcher.seams, watcher.macs))
    read: dict[tuple[int, int], dict[Operand, Tensor]] = {}
    for operand, (edge, value) in watcher.read.items():
        place = found.place(edge)
        if place is not None:
            read.setdefault(place, {})[operand] = value
    order = sorted(read, key=lambda place: found.drawn[place][-1])
    names = [node.name for node in found.graph.nodes]
    edges = [FlowEdge(names[found.drawn[e][0][0]], names[found.drawn[e][-1][1]], found.drawn[e]) for e in order]
    return Flow(call, found.graph, tuple(edges), tuple(watcher.operations), tuple(read[e] for e in order))


class _Watcher(Tracer):
    """A tracer of a real forward that keeps what nodes read from each other."""

    def __init__(self, model: nn.Module, specs: Any) -> None:
        super().__init__(model, specs)
        self.operations: list[str] = []
        self.read: dict[Operand, tuple[tuple[int, int], Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if _is_silent(func):
            return super().__torch_dispatch__(func, types, args, kwargs)
        operands = list(tensors_of((args, kwargs)))
        known = [self.values.get(id(tensor), UNKNOWN) for tensor in operands]
        writes = func._schema.is_mutable  # then it overwrites what it read
        kept = [tensor.clone() if writes else tensor for tensor in operands]
        out = func(*args, **kwargs)
        name, before = func._schema.name.split("::")[-1], len(self.ops)
        outs = list(tensors_of(out))
        if outs or writes:
            self._record(name.removesuffix("_") if writes else name, func, args, operands, outs)
        layers = dict.fromkeys(value.weight for value in known if value.weight is not None)
        for place, (value, tensor) in enumerate(zip(known, kept, strict=True)):
            if value.source is None:
                continue
            targets = [self._node_of[layer] for layer in layers] or list(range(before, len(self.ops)))
            if targets:  # an attention makes two nodes; its third operand, the values, enters the second
                target = targets[-1] if place == 2 and len(targets) > 1 else targets[0]
                self.read[len(self.operations), place] = (value.source, target), tensor.clone()
        self.operations.append(str(func))
        return out


class _Carrier(TorchDispatchMode):
    """Runs the same operations, and hands some of them tensors of full precision."""

    def __init__(self, operations: tuple[str, ...], tensors: dict[Operand, Tensor]) -> None:
        super().__init__()
        self._operations = operations
        self._count = 0
        self._given: dict[int, dict[int, Tensor]] = {}
        for (operation, place), tensor in tensors.items():
            self._given.setdefault(operation, {})[place] = tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None) -> Any:
        if _is_silent(func):
            return func(*args, **(kwargs or {}))
        if self._count >= len(self._operations) or self._operations[self._count] != str(func):
            raise QuantDMError(
                "paths: with quantized weights the denoiser runs other operations than in full precision (its way "
                "depends on values); what each edge carries cannot be compared"
            )
        given = self._given.get(self._count)
        self._count += 1
        if given is None:
            return func(*args, **(kwargs or {}))
        places = iter(range(len(self._operations)))

        def change(tensor: Tensor) -> Tensor:
            value = given.get(next(places))
            if value is None:
                return tensor
            return tensor.copy_(value) if func._schema.is_mutable else value

        changed: tuple[Any, dict[str, Any]] = map_tensors((args, kwargs or {}), change)
        return func(*changed[0], **changed[1])


def _is_silent(func: Any) -> bool:
    return func._schema.name.split("::")[-1] in _SILENT
