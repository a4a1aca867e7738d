"""The data-flow graph of any diffusers denoiser: weight nodes, combine nodes, blocks with root and hops."""

import heapq
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import nn

from quantdm.denoisers.blocks import Dag, Group, partition, settle_blocks, weights_below
from quantdm.denoisers.example_inputs import infer_inputs, to_meta
from quantdm.denoisers.trace import Trace, trace_forward, weight_specs
from quantdm.errors import QuantDMError, nearest
from quantdm.files import digest

VERSION = 1
_STAGE = re.compile(r"(?:^|\.)(down|mid|up)_?blocks?(?:\.|$)")
_CACHE: dict[str, "Analysis"] = {}


@dataclass(frozen=True)
class Node:
    """A weight layer, or a weightless operation that joins several outputs ("product", "add", "modulation", ...).

    `block` is the index of the block (-1: a combine node between blocks); `depth` the topological position in 0..1.
    """

    id: int
    name: str
    kind: Literal["weight", "combine"]
    op_type: str
    layer: str | None
    block: int
    depth: float
    stage: str


@dataclass(frozen=True)
class Block:
    """Weights that are chosen together: exactly those in the in-neighbourhood of node `root` within `hops` hops."""

    index: int
    name: str
    root: int
    hops: int
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """A directed acyclic graph; node ids are positions in `nodes`, in topological order; edges are (from, to)."""

    nodes: tuple[Node, ...]
    edges: tuple[tuple[int, int], ...]
    blocks: tuple[Block, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the graph as a JSON record with a version."""
        return {
            "version": VERSION,
            "nodes": [asdict(n) for n in self.nodes],
            "edges": [list(e) for e in self.edges],
            "blocks": [{**asdict(b), "layers": list(b.layers)} for b in self.blocks],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Graph":
        """Build a graph from `to_dict`'s record.

        Raises:
            QuantDMError: another version, a missing or unknown field, ids that are no positions, edges to nowhere.
        """
        if not isinstance(record, Mapping) or record.get("version") != VERSION:
            got = record.get("version") if isinstance(record, Mapping) else type(record).__name__
            raise QuantDMError(f"graph record: got version {got}, expected {VERSION}; trace the denoiser again")
        try:
            nodes = tuple(Node(**n) for n in record["nodes"])
            blocks = tuple(Block(**{**b, "layers": tuple(b["layers"])}) for b in record["blocks"])
            edges = tuple((int(a), int(b)) for a, b in record["edges"])
        except (KeyError, TypeError, ValueError) as error:
            expected = ", ".join(f.name for f in fields(Node))
            raise QuantDMError(
                f"graph record: {error}; expected nodes of {expected}, blocks, edges; trace the denoiser again"
            ) from None
        ids = range(len(nodes))
        ends = [*(i for e in edges for i in e), *(b.root for b in blocks)]
        if any(n.id != i for i, n in enumerate(nodes)) or any(i not in ids for i in ends):
            raise QuantDMError("graph record: ids are not the positions of its nodes; trace the denoiser again")
        return cls(nodes, edges, blocks)


@dataclass(frozen=True)
class Analysis:
    """What one trace gives: the raw trace and the graph made of it."""

    trace: Trace
    graph: Graph


def trace_graph(denoiser: nn.Module, *, example_inputs: Mapping[str, Any] | None = None) -> Graph:
    """Return the data-flow graph of a diffusers denoiser, traced on the meta device.

    A weightless copy made from the class and its configuration is traced, so real, meta and quantized denoisers give
    the same graph; nothing is computed and the denoiser is not touched. The result is cached.

    Args:
        denoiser: any diffusers model (`from_config`, `config`).
        example_inputs: keyword arguments of one forward call; without them they are inferred from the configuration.

    Raises:
        QuantDMError: not a diffusers model, inputs that cannot be inferred, a forward that fails on the meta device,
            or modules that no longer match the configuration (fused projections, adapters).

    Blocks, roots and hops as in Qua2SeDiMo (arXiv 2412.14628).
    """
    return analyse(denoiser, example_inputs=example_inputs).graph


def analyse(denoiser: nn.Module, *, example_inputs: Mapping[str, Any] | None = None) -> Analysis:
    """Return the cached trace and graph of a denoiser (see `trace_graph`)."""
    config = _config(denoiser)
    key = digest(
        f"{type(denoiser).__module__}.{type(denoiser).__qualname__}",
        json.loads(json.dumps(config, sort_keys=True, default=str)),
        None if example_inputs is None else _signature(example_inputs),
    )
    if key not in _CACHE:
        copy = _meta_copy(denoiser, config)
        inputs = infer_inputs(copy, config) if example_inputs is None else to_meta(example_inputs)
        try:
            trace = trace_forward(copy, dict(inputs))
        except Exception as error:  # whatever foreign code raises
            raise QuantDMError(
                f"{type(denoiser).__name__}: its forward fails on the meta device with inputs {_signature(inputs)}: "
                f"{type(error).__name__}: {error}; pass example_inputs=... with the keyword arguments of one call"
            ) from error
        _CACHE[key] = Analysis(trace, _build(trace))
    found = _CACHE[key]
    _check_modules(denoiser, [s.name for s in found.trace.specs])
    return found


def op_type_of(layer: str, below: Mapping[str, int]) -> str:
    """Return the operation type: the path after the last repeated element ("attn1.to_q", "resnets.conv1").

    Args:
        layer: dotted path.
        below: number of weight layers below every module path; a numbered element with several is repeated structure.
    """
    parts = layer.split(".")
    cut = max((k for k, p in enumerate(parts) if p.isdigit() and below[".".join(parts[: k + 1])] > 1), default=-1)
    rest = parts[cut + 1 :]
    alone = sum(not p.isdigit() for p in rest) == 1  # "conv1" says too little: keep the list's name before it
    return ".".join([parts[cut - 1], *rest] if alone and cut > 0 else rest)


def stage_of(path: str) -> str:
    """Return "down", "mid" or "up" for a path inside such a block of a U-Net, else ""."""
    match = _STAGE.search(path)
    return match.group(1) if match else ""


def _config(denoiser: nn.Module) -> dict[str, Any]:
    config = getattr(denoiser, "config", None)
    if not isinstance(denoiser, nn.Module) or not isinstance(config, Mapping) or not hasattr(denoiser, "from_config"):
        raise QuantDMError(
            f"denoiser: got {type(denoiser).__name__}, expected a diffusers model with a config; "
            "pass pipe.unet or pipe.transformer (not a pipeline or a compiled wrapper)"
        )
    return {k: v for k, v in config.items() if k not in ("quantization_config", "_name_or_path")}


def _meta_copy(denoiser: nn.Module, config: dict[str, Any]) -> nn.Module:
    # forked: constants that the constructor draws must not move the caller's random state
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        copy = type(denoiser).from_config(dict(config))  # pyright: ignore[reportAttributeAccessIssue]
    return copy.to("meta").eval()


def _check_modules(denoiser: nn.Module, layers: list[str]) -> None:
    """Refuse a denoiser whose layers are not those of its configuration."""
    present = {name for name, _ in denoiser.named_modules()}
    odd = [name for name in layers if name not in present]
    odd += sorted({s.name for s in weight_specs(denoiser)} - set(layers))
    if odd:
        raise QuantDMError(
            f"{type(denoiser).__name__}: {len(odd)} layers do not follow from its configuration, the first is "
            f"{odd[0]} ({nearest(odd[0], layers)}); undo fused projections (unfuse_qkv_projections) and unload adapters"
        )


def _signature(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, Mapping):
        return {str(k): _signature(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_signature(v) for v in value]
    return str(value)


def _build(trace: Trace) -> Graph:
    """Reduce a raw trace to the graph and partition its weights."""
    layers = [s.name for s in trace.specs]
    below = weights_below(layers)
    dag = Dag(trace)
    groups = partition(dag, layers)
    settle_blocks(dag, groups)
    reached = dag.weights()
    order = _topological(dag)
    # A layer that this forward never calls (an unused option) stands alone at the end: it has no data flow.
    idle = [name for name in layers if name not in reached]
    new = {old: i for i, old in enumerate(order)}
    groups = sorted(groups, key=lambda g: new[g.root])
    block_of = _blocks_of_nodes(dag, groups)
    last = max(len(order) + len(idle) - 1, 1)
    nodes, named = [], Counter()
    for i, old in enumerate(order):
        op = dag.ops[old]
        kind = "weight" if op.layer is not None else "combine"
        op_type = op_type_of(op.layer, below) if op.layer is not None else _combine_type(dag.kinds[old])
        name = op.layer or f"{op.path or 'denoiser'}/{op_type}"
        named[name] += 1
        name = name if named[name] == 1 else f"{name}.{named[name]}"
        nodes.append(Node(i, name, kind, op_type, op.layer, block_of.get(old, -1), i / last, stage_of(op.path)))
    blocks = [
        Block(
            b,
            g.name,
            new[g.root],
            g.hops,
            tuple(dag.ops[w].layer or "" for w in sorted(g.weights, key=lambda w: new[w])),
        )
        for b, g in enumerate(groups)
    ]
    for name in idle:
        i, b = len(nodes), len(blocks)
        nodes.append(Node(i, name, "weight", op_type_of(name, below), name, b, i / last, stage_of(name)))
        blocks.append(Block(b, name, i, 0, (name,)))
    edges = sorted((new[source], new[i]) for i, sources in dag.inputs.items() for source in sources)
    return Graph(tuple(nodes), tuple(edges), tuple(blocks))


def _topological(dag: Dag) -> list[int]:
    """Order the nodes so that every edge points forward, in order of execution where there is a choice."""
    waiting = {i: len(sources) for i, sources in dag.inputs.items()}
    # a border stands where its source does: right behind it
    when = {i: (dag.inputs[i][0], 1) if dag.kinds[i] == ("border",) else (i, 0) for i in dag.inputs}
    ready = [(when[i], i) for i, count in waiting.items() if count == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        _, i = heapq.heappop(ready)
        order.append(i)
        for target in dag.outputs[i]:
            waiting[target] -= 1
            if waiting[target] == 0:
                heapq.heappush(ready, (when[target], target))
    assert len(order) == len(waiting), "the traced graph has a circle"
    return order


def _blocks_of_nodes(dag: Dag, groups: list[Group]) -> dict[int, int]:
    """Map nodes to block indices: the weights, and the combine nodes between a block's weights and its root."""
    block_of: dict[int, int] = {}
    for b, group in enumerate(groups):
        block_of |= dict.fromkeys(group.weights, b)
        below = set(group.weights)
        todo = list(group.weights)
        while todo:  # downstream of the weights ...
            for target in dag.outputs[todo.pop()]:
                if target not in below and not dag.is_weight(target):
                    below.add(target)
                    todo.append(target)
        ring = {group.root}
        for _ in range(group.hops):  # ... and upstream of the root
            block_of |= dict.fromkeys((i for i in ring if i in below and not dag.is_weight(i)), b)
            ring = {source for i in ring for source in dag.inputs[i]}
    return block_of


def _combine_type(kinds: tuple[str, ...]) -> str:
    """Name a combine node by the operations merged in it."""
    for kind in ("product", "concat", "border"):
        if kind in kinds:
            return kind
    if "norm" in kinds:
        return "modulation" if {"mul", "add"} & set(kinds) else "norm"
    return next((kind for kind in ("add", "mul") if kind in kinds), "combine")
