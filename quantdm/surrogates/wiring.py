"""How layers of one block reach its root: the paths along which the graph surrogate's messages run."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantdm.denoisers.graph import Block, Graph
from quantdm.surrogates.features import type_index
from quantdm.surrogates.space import SearchSpace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Wiring:
    """Blocks of more than one layer, the paths from their layers to their roots, and what is of one kind.

    Messages are linear along a path, so the network need not walk the graph for every configuration: what a root hears
    of a layer is the sum over paths of the product of the gates of the nodes that receive.
    """

    names: tuple[str, ...]  # [B] of the blocks
    hops: Ints  # [B] how many hops the root is away from the farthest layer
    blocks: tuple[tuple[int, ...], ...]  # [B] positions on the layer axis
    member: Floats  # [L, B]: 1 where the layer belongs to the block
    alone: Ints  # positions of the layers that belong to no such block
    path_layer: Ints  # [paths]
    path_types: Floats  # [paths, node types]: how often a type receives along the path
    types: tuple[str, ...]  # of nodes
    type_of: Ints  # [L] operation type of every layer
    kinds: Floats  # [B, kinds], one-hot: blocks of the same operation types are of one kind

    @property
    def size(self) -> Floats:
        """Return the number of layers of every block [B]."""
        return self.member.sum(axis=0)


def wire(space: SearchSpace) -> Wiring:
    """Find the blocks of a space and the paths from their layers to their roots, within their hops."""
    graph, types = space.graph, tuple(sorted({node.op_type for node in space.graph.nodes}))
    sources = sources_of(graph)
    blocks = [block for block in graph.blocks if len(block.layers) > 1]
    layers = [tuple(sorted(space.layer_index[name] for name in block.layers)) for block in blocks]
    path_layer, path_types = [], []
    for block in blocks:
        for path in paths_to_root(graph, block, sources):
            path_layer.append(space.layer_index[str(graph.nodes[path[-1]].layer)])
            received = [types.index(graph.nodes[node].op_type) for node in path[:-1]]  # all but the layer itself
            path_types.append(np.bincount(received, minlength=len(types)))
    member = np.zeros((len(space.layers), len(blocks)))
    for index, inside in enumerate(layers):
        member[list(inside), index] = 1
    _, type_of = type_index(space)
    made_of = [tuple(type_of[list(inside)]) for inside in layers]
    kinds = list(dict.fromkeys(made_of))
    return Wiring(
        names=tuple(block.name for block in blocks),
        hops=np.array([block.hops for block in blocks], dtype=np.int64),
        blocks=tuple(layers),
        member=member,
        alone=np.flatnonzero(~member.any(axis=1)),
        path_layer=np.array(path_layer, dtype=np.int64),
        path_types=np.array(path_types, dtype=np.float64).reshape(len(path_layer), len(types)),
        types=types,
        type_of=type_of,
        kinds=np.array([[kind == own for kind in kinds] for own in made_of], dtype=np.float64).reshape(
            len(blocks), len(kinds)
        ),
    )


def sources_of(graph: Graph) -> dict[int, list[int]]:
    """Return the nodes from which every node receives."""
    sources: dict[int, list[int]] = {node.id: [] for node in graph.nodes}
    for source, target in graph.edges:
        sources[target].append(source)
    return sources


def paths_to_root(graph: Graph, block: Block, sources: dict[int, list[int]]) -> list[tuple[int, ...]]:
    """Return every path of at most `hops` edges from a layer of the block to its root, as (root, ..., layer)."""
    ends, found = [(block.root,)], []
    for _ in range(block.hops + 1):
        found += [path for path in ends if graph.nodes[path[-1]].layer in block.layers]
        ends = [(*path, source) for path in ends for source in sources[path[-1]]]
    return found
