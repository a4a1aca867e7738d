"""Several denoisers of one pipeline as one: joint layers, graph and weights. One alone keeps its own names.

The layers of the first denoiser keep their names, those of every other are called `PART:layer`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from quantdm.denoisers.graph import Block, Graph, Node
from quantdm.denoisers.inventory import LayerRecord
from quantdm.denoisers.tables import TableRecord
from quantdm.recipe.joint import joint_prefix


def join_layers(layers: Mapping[str, Sequence[LayerRecord]]) -> tuple[LayerRecord, ...]:
    """Return the layers of all parts under joint names, in order."""
    found: list[LayerRecord] = []
    for number, (part, records) in enumerate(layers.items()):
        prefix, start = joint_prefix(part, number), len(found)
        found += [
            replace(
                record,
                name=prefix + record.name,
                op_type=prefix + record.op_type,
                block=prefix + record.block,
                index=start + record.index,
            )
            for record in records
        ]
    return tuple(found)


def join_tables(tables: Mapping[str, Sequence[TableRecord]]) -> tuple[TableRecord, ...]:
    """Return the embedding tables of all parts under joint names, in order."""
    found: list[TableRecord] = []
    for number, (part, records) in enumerate(tables.items()):
        prefix = joint_prefix(part, number)
        found += [replace(table, name=prefix + table.name, op_type=prefix + table.op_type) for table in records]
    return tuple(found)


def join_graphs(graphs: Mapping[str, Graph]) -> Graph:
    """Return the graphs of all parts side by side: no edge leads from one to another."""
    nodes: list[Node] = []
    edges: list[tuple[int, int]] = []
    blocks: list[Block] = []
    for number, (part, graph) in enumerate(graphs.items()):
        prefix, first, first_block = joint_prefix(part, number), len(nodes), len(blocks)
        nodes += [
            replace(
                node,
                id=first + node.id,
                name=prefix + node.name,
                op_type=prefix + node.op_type,
                layer=None if node.layer is None else prefix + node.layer,
                block=node.block if node.block < 0 else first_block + node.block,
            )
            for node in graph.nodes
        ]
        edges += [(first + a, first + b) for a, b in graph.edges]
        blocks += [
            replace(
                block,
                index=first_block + block.index,
                name=prefix + block.name,
                root=first + block.root,
                layers=tuple(prefix + layer for layer in block.layers),
            )
            for block in graph.blocks
        ]
    return Graph(tuple(nodes), tuple(edges), tuple(blocks))


def join_weights(modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return a module in which every parameter has its joint name; it shares them, and it has no forward.

    A single denoiser is returned as it is.
    """
    if len(modules) == 1:
        return next(iter(modules.values()))
    joint = nn.Module()
    for number, (part, module) in enumerate(modules.items()):
        prefix = joint_prefix(part, number)
        for name, child in module.named_children():
            joint.add_module(prefix + name, child)
        for name, parameter in module.named_parameters(recurse=False):
            joint.register_parameter(prefix + name, parameter)
    return joint
