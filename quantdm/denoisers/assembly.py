"""From a raw trace to the graph: reduce, partition into blocks, order, name."""

import heapq
from collections import Counter
from dataclasses import dataclass

from quantdm.denoisers.blocks import Dag, Group, partition, settle_blocks
from quantdm.denoisers.graph import Block, Graph, Node
from quantdm.denoisers.names import op_type_of, stage_of, weights_below
from quantdm.denoisers.trace import Trace

Edge = tuple[int, int]


@dataclass(frozen=True)
class Assembly:
    """A graph, and where in it the edges of the raw trace lie.

    `into`: a raw node that was merged -> the node that it became part of. `drawn`: every edge between raw nodes that
    were left then -> the edges of the graph that stand for it.
    """

    graph: Graph
    into: dict[int, int]
    drawn: dict[Edge, tuple[Edge, ...]]

    def place(self, edge: Edge) -> Edge | None:
        """Return the edge that a raw edge became, or None where it lies inside a node or leads nowhere."""
        a, b = (self._left(node) for node in edge)
        return (a, b) if (a, b) in self.drawn else None

    def _left(self, node: int) -> int:
        while node in self.into:
            node = self.into[node]
        return node


def build_graph(trace: Trace) -> Graph:
    """Reduce a raw trace to the graph and partition its weights."""
    return assemble(trace).graph


def assemble(trace: Trace) -> Assembly:
    """Build the graph and remember which of its edges came from which of the trace."""
    layers = [s.name for s in trace.specs]
    below = weights_below(layers)
    dag = Dag(trace)
    groups = partition(dag, layers)
    before = {i: list(sources) for i, sources in dag.inputs.items()}
    settle_blocks(dag, groups)
    reached = dag.weights()
    order = _topological(dag)
    # A layer that this forward never calls (an unused option) stands alone at the end: it has no data flow.
    idle = [name for name in layers if name not in reached]
    new = {old: i for i, old in enumerate(order)}
    groups = sorted(groups, key=lambda g: new[g.root])
    last = max(len(order) + len(idle) - 1, 1)
    nodes = _nodes(dag, order, _blocks_of_nodes(dag, groups), below, last)
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
    drawn = {
        edge: tuple((new[a], new[b]) for a, b in found) for edge, found in _settled_edges(dag, before).items() if found
    }
    return Assembly(Graph(tuple(nodes), tuple(edges), tuple(blocks)), dag.into, drawn)


def _nodes(dag: Dag, order: list[int], block_of: dict[int, int], below: Counter[str], last: int) -> list[Node]:
    """Return the nodes in order, every one with a name of its own."""
    nodes: list[Node] = []
    named: Counter[str] = Counter()
    for i, old in enumerate(order):
        op = dag.ops[old]
        kind = "weight" if op.layer is not None else "combine"
        op_type = op_type_of(op.layer, below) if op.layer is not None else _combine_type(dag.kinds[old])
        name = op.layer or f"{op.path or 'denoiser'}/{op_type}"
        named[name] += 1
        name = name if named[name] == 1 else f"{name}.{named[name]}"
        nodes.append(Node(i, name, kind, op_type, op.layer, block_of.get(old, -1), i / last, stage_of(op.path)))
    return nodes


def _settled_edges(dag: Dag, before: dict[int, list[int]]) -> dict[Edge, list[Edge]]:
    """Return for every edge from before the blocks were settled those that stand for it: past borders and removals."""
    readers: dict[int, list[int]] = {}
    for i, sources in before.items():
        for source in sources:
            readers.setdefault(source, []).append(i)

    def ends(node: int, further: dict[int, list[int]]) -> list[int]:
        if node in dag.inputs:
            return [node]
        return [end for other in further.get(node, []) for end in ends(other, further)]

    def between(a: int, b: int) -> list[Edge]:
        if a in dag.inputs[b]:
            return [(a, b)]
        borders = [n for n in dag.inputs[b] if dag.kinds[n] == ("border",) and dag.inputs[n] == [a]]
        return [edge for n in borders for edge in ((a, n), (n, b))]

    found: dict[Edge, list[Edge]] = {}
    for target, sources in before.items():
        for source in sources:
            pairs = [(a, b) for a in ends(source, before) for b in ends(target, readers)]
            found[source, target] = list(dict.fromkeys(edge for a, b in pairs for edge in between(a, b)))
    return found


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
