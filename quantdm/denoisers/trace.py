"""Follow every tensor through one forward on the meta device: which weights made it, where a long skip joined it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantdm.denoisers.aten import COMBINES, NORMS, PRODUCTS, carried_dim
from quantdm.denoisers.calls import scoped
from quantdm.denoisers.constants import MAX_ELEMENTS, Constants, map_tensors, tensors_of
from quantdm.denoisers.input_rules import batch_of
from quantdm.denoisers.on_meta import friendly_to_meta
from quantdm.denoisers.weights import WeightSpec, weight_specs


@dataclass
class Op:
    """One node of the raw DAG: a weight layer, or a weightless operation that joins several weights' outputs."""

    layer: str | None
    path: str  # the module that was running
    kinds: tuple[str, ...]  # "norm", "mul", "add", "concat", "product", "other", "border"; empty for a weight
    inputs: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Trace:
    """Raw DAG of one forward.

    `seams`: layer -> input channel where its concatenated long skip begins; `macs`: layer -> multiply-accumulates of
    its products with data in this forward, for one sample.
    """

    specs: tuple[WeightSpec, ...]  # in named_modules() order
    ops: tuple[Op, ...]
    outputs: frozenset[int]
    seams: dict[str, int]
    macs: dict[str, int]


@dataclass(frozen=True)
class Value:
    """What is known of a tensor: the node that made it (None: no weight upstream), or the parameter it is a view of."""

    source: int | None = None
    param: bool = False
    weight: str | None = None
    seam: tuple[int, int] | None = None  # (dimension, position) of a long-skip concatenation


UNKNOWN = Value()


class ForwardError(Exception):
    """A forward that raised; of two failures, the one that came further has the greater `reached`."""

    def __init__(self, reached: tuple[int, list[int]]) -> None:
        super().__init__(reached)
        self.reached = reached


def trace_forward(model: nn.Module, inputs: dict[str, Any]) -> Trace:
    """Run `model(**inputs)` on the meta device and return its raw data-flow DAG.

    Args:
        model: a denoiser on the meta device, in eval mode; forward hooks are added for the time of the call.
        inputs: keyword arguments; tensors on the meta device, or with values on the CPU.

    Raises:
        ForwardError: from what the forward raised.
    """
    specs = weight_specs(model)
    tracer = Tracer(model, specs)
    inputs = map_tensors(inputs, tracer.valued)
    try:
        with torch.no_grad(), friendly_to_meta(), scoped(model, tracer.scope), tracer:
            result = model(**inputs)
    except Exception as error:  # whatever foreign code raises
        raise ForwardError(tracer.reached(error)) from error
    outputs = tracer.outputs_of(result)
    if not outputs:
        raise ForwardError((0, [])) from ValueError("its output depends on none of its layers")
    macs = {name: -(-count // batch_of(inputs)) for name, count in tracer.macs.items()}
    return Trace(specs, tuple(tracer.ops), outputs, tracer.seams, macs)


class Tracer(TorchDispatchMode):
    """Tags every tensor with the node that produced it; aten level, so it sees through any Python of the model."""

    def __init__(self, model: nn.Module, specs: Iterable[WeightSpec]) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.seams: dict[str, int] = {}
        self.macs: dict[str, int] = {}
        self.scope: list[str] = []
        self.constants = Constants()
        self.values: dict[int, Value] = {id(p): Value(param=True) for p in model.parameters()}
        self.shapes = {s.name: s.shape for s in specs}
        self._node_of: dict[str, int] = {}
        self._called_again = False
        self._aliases: dict[int, list[int]] = {}  # storage -> tensors, for in-place writes through a view
        self._alive: list[Any] = list(model.parameters())  # ids stay unique while their tensors live
        for spec in specs:
            weight = model.get_submodule(spec.name).weight
            self.values[id(weight)] = Value(param=True, weight=spec.name)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = self.constants.call(func, args, kwargs)
        name = func._schema.name.split("::")[-1]
        outs = list(tensors_of(out))
        operands = list(tensors_of((args, kwargs)))
        if outs or func._schema.is_mutable:
            self._record(name.removesuffix("_") if func._schema.is_mutable else name, func, args, operands, outs)
        return out

    def reached(self, error: Exception) -> tuple[int, list[int]]:
        """Say how far a forward came: after how many layers, and at which lines of code, from the outside inwards."""
        return len(self._node_of), [line for _, line in walk_tb(error.__traceback__)]

    def outputs_of(self, result: Any) -> frozenset[int]:
        """Return the nodes that made what a forward returned."""
        sources = (self.values.get(id(t), UNKNOWN).source for t in tensors_of(_plain(result)))
        return frozenset(source for source in sources if source is not None)

    def valued(self, tensor: Tensor) -> Tensor:
        """Return an input on the meta device; masks, ids and positions that came without values are ones."""
        if tensor.is_meta and not tensor.is_floating_point() and tensor.numel() <= MAX_ELEMENTS:
            tensor = torch.ones(tensor.shape, dtype=tensor.dtype)
        return tensor if tensor.is_meta else self.constants.lift(tensor)

    def _record(self, name: str, func: Any, args: tuple[Any, ...], operands: list[Tensor], outs: list[Tensor]) -> None:
        values = [self.values.get(id(t), UNKNOWN) for t in operands]
        layers = list(dict.fromkeys(v.weight for v in values if v.weight is not None))
        only_params = bool(values) and all(v.param for v in values)
        if only_params and not (layers and name in PRODUCTS):
            result = Value(param=True, weight=layers[0] if len(layers) == 1 else None)
        elif layers:
            self._find_seam(name, args)
            self._count(name, layers, outs)
            nodes = [self._call_weight(layer, values) for layer in layers]
            result = Value(nodes[0] if len(nodes) == 1 else self._combine(("other",), nodes))
        else:
            result = Value(self._data_op(name, values, args))
        for out in outs:
            seam = None if result.param or layers else self._seam_after(name, func, args, operands, values, out)
            self._tag(out, replace(result, seam=seam))
        if func._schema.is_mutable and not result.param:
            self._write_through(func, args, result)

    def _call_weight(self, layer: str, values: list[Value]) -> int:
        """Return the node of a weight layer (one per layer, however often it is called) with its inputs added."""
        node = self._node_of.get(layer)
        if node is None:
            node = self._node_of[layer] = self._new(Op(layer, self._path(), ()))
        else:
            self._called_again = True
        for source in _sources(values):
            # A layer called again on its own output would close a circle: the graph keeps the first pass.
            if source not in self.ops[node].inputs and not self._reaches(node, source):
                self.ops[node].inputs.append(source)
        return node

    def _data_op(self, name: str, values: list[Value], args: tuple[Any, ...]) -> int | None:
        sources = _sources(values)
        if "scaled_dot_product" in name and len(sources) > 1:
            q, k, v = (self.values.get(id(t), UNKNOWN).source for t in args[:3])
            others = [s for s in sources if s not in (q, k, v)]
            scores = self._combine(("product",), _unique([q, k, *others]))
            return self._combine(("product",), _unique([scores, v]))
        if name in NORMS and sources:
            return self._new(Op(None, self._path(), ("norm",), sources))
        kind = "product" if name in PRODUCTS else COMBINES.get(name, "other")
        return self._combine((kind,), sources)

    def _combine(self, kinds: tuple[str, ...], sources: list[int]) -> int | None:
        if len(sources) < 2:  # a weightless operation on one node's output is part of the edge
            return sources[0] if sources else None
        return self._new(Op(None, self._path(), kinds, sources))

    def _find_seam(self, name: str, args: tuple[Any, ...]) -> None:
        if name not in PRODUCTS:
            return
        operands = [args[i] for i in PRODUCTS[name]]
        for x, weight, from_end in ((operands[0], operands[1], 1), (operands[1], operands[0], 2)):
            layer = self.values.get(id(weight), UNKNOWN).weight
            seam = self.values.get(id(x), UNKNOWN).seam
            if layer is None or seam is None:
                continue
            shape = self.shapes[layer]
            dim = x.dim() - len(shape) + 1 if "conv" in name else x.dim() - from_end
            if seam[0] == dim and x.shape[dim] == shape[1]:  # grouped convolutions read no channel range as a whole
                self.seams[layer] = seam[1]

    def _count(self, name: str, layers: list[str], outs: list[Tensor]) -> None:
        """Add the products of weights with data: every output sums over what one output channel has of weights."""
        for layer in layers if name in PRODUCTS else ():
            row = math.prod(self.shapes[layer][1:])
            self.macs[layer] = self.macs.get(layer, 0) + outs[0].numel() * row

    def _seam_after(
        self, name: str, func: Any, args: tuple[Any, ...], operands: list[Tensor], values: list[Value], out: Tensor
    ) -> tuple[int, int] | None:
        if name == "cat":
            parts, *rest = args
            dim = (rest[0] if rest else 0) % max(out.dim(), 1)
            position = self._skip_position(parts, dim)
            if position is not None:
                return dim, position
            seams = {v.seam for v in values}  # parts that all have the same seam, joined along another dimension
            seam = seams.pop() if len(seams) == 1 else None
            return seam if seam is not None and seam[0] != dim else None
        for tensor, value in zip(operands, values, strict=True):
            if value.seam is None:
                continue
            dim = carried_dim(name, func, args, tensor, value.seam[0], out)
            if dim is not None and out.shape[dim] == tensor.shape[value.seam[0]]:
                return dim, value.seam[1]
        return None

    def _skip_position(self, parts: list[Tensor], dim: int) -> int | None:
        """Return where a long skip meets the main path: one part is upstream of its neighbour, through weights.

        That is what tells a skip from the other concatenations: tokens of two modalities, sine with cosine, text with
        size embeddings or the two branches of a parallel block are siblings, none is made from the other.
        """
        sources = [self.values.get(id(t), UNKNOWN).source for t in parts]
        position = 0
        for left, right, part in zip(sources, sources[1:], parts, strict=False):
            position += part.shape[dim]
            if left is None or right is None or left == right:
                continue
            if self._reaches(left, right, through_weight=True) or self._reaches(right, left, through_weight=True):
                return position
        return None

    def _reaches(self, start: int, end: int, *, through_weight: bool = False) -> bool:
        """Say whether `end` is downstream of (or is) `start`; with `through_weight`, past a weight other than start."""
        todo, seen = [(end, False)], set()
        while todo:
            state = todo.pop()
            if state in seen:
                continue
            seen.add(state)
            node, passed = state
            if node < start and not self._called_again:  # inputs are older than what they feed
                continue
            if node == start:
                if passed or not through_weight:
                    return True
                continue
            passed = passed or self.ops[node].layer is not None
            todo.extend((i, passed) for i in self.ops[node].inputs)
        return False

    def _write_through(self, func: Any, args: tuple[Any, ...], result: Value) -> None:
        for argument, target in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(target, Tensor):
                for other in self._aliases.get(target.untyped_storage()._cdata, []):
                    known = self.values[other]
                    self.values[other] = replace(result, seam=known.seam)

    def _tag(self, tensor: Tensor, value: Value) -> None:
        if id(tensor) not in self.values:
            self._alive.append(tensor)
            self._aliases.setdefault(tensor.untyped_storage()._cdata, []).append(id(tensor))
        self.values[id(tensor)] = value

    def _new(self, op: Op) -> int:
        self.ops.append(op)
        return len(self.ops) - 1

    def _path(self) -> str:
        return self.scope[-1] if self.scope else ""


def _sources(values: Iterable[Value]) -> list[int]:
    return _unique(v.source for v in values)


def _unique(nodes: Iterable[int | None]) -> list[int]:
    return list(dict.fromkeys(n for n in nodes if n is not None))


def _plain(result: Any) -> Any:
    return list(result.values()) if hasattr(result, "values") and not isinstance(result, Tensor) else result
