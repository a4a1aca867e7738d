"""From a raw trace to the graph: reduce, partition into blocks, order, name."""

import heapq
from collections import Counter

from quantdm.denoisers.blocks import Dag, Group, partition, settle_blocks
from quantdm.denoisers.graph import Block, Graph, Node
from quantdm.denoisers.names import op_type_of, stage_of, weights_below
from quantdm.denoisers.trace import Trace


def build_graph(trace: Trace) -> Graph:
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
