"""Which nodes message-passing layers have to compute, so that every block's root is known at its hop count."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quantdm.denoisers.graph import Block, Graph

Level = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Nodes per level: level 0 is the encoder's output, level m the output of layer m.

    A node is computed at level m only if a root with hop count >= m depends on it. Levels are nested; ids are those of
    the graph.
    """

    levels: tuple[Level, ...]
    edges: tuple[tuple[tuple[int, int], ...], ...]  # edges[m-1]: positions (in level m-1, in level m), self loops too
    roots: tuple[Level, ...]  # roots[m]: positions in level m of the nodes that are read out there

    @property
    def hops(self) -> int:
        """Number of message-passing layers."""
        return len(self.levels) - 1

    @cached_property
    def kept(self) -> tuple[Tensor, ...]:
        """Positions in level m-1 of the nodes of level m, for m = 1 ... hops."""
        pairs = zip(self.levels, self.levels[1:], strict=False)
        return tuple(torch.tensor([before.index(node) for node in after], dtype=torch.long) for before, after in pairs)

    def batched_edges(self, batch: int) -> list[Tensor]:
        """Return the edge index [2, E·B] of every layer for B graphs at once; node n of graph b is row n·B + b."""
        offsets = torch.arange(batch)
        found = []
        for edges in self.edges:
            pairs = torch.tensor(edges, dtype=torch.long).T  # [2, E]
            found.append((pairs[:, :, None] * batch + offsets).flatten(1))
        return found


def make_plan(graph: Graph, blocks: Sequence[Block], *, all_weights: bool) -> Plan:
    """Plan the computation of the roots of `blocks`; `all_weights` reads every weight node out at level 0 too."""
    hops = max((block.hops for block in blocks), default=0)
    sources: dict[int, list[int]] = {node.id: [] for node in graph.nodes}
    for source, target in graph.edges:
        sources[target].append(source)
    needed: list[set[int]] = [set() for _ in range(hops + 1)]
    roots: list[list[int]] = [sorted(block.root for block in blocks if block.hops == m) for m in range(hops + 1)]
    roots[0] = [node.id for node in graph.nodes if node.layer is not None] if all_weights else []
    for m in range(hops, -1, -1):
        needed[m] |= set(roots[m])
        if m:
            needed[m - 1] |= needed[m] | {source for node in needed[m] for source in sources[node]}
    levels = [tuple(sorted(nodes)) for nodes in needed]
    position = [{node: index for index, node in enumerate(level)} for level in levels]
    edges = [
        tuple((position[m - 1][s], position[m][node]) for node in levels[m] for s in (*sources[node], node))
        for m in range(1, hops + 1)
    ]
    read_out = tuple(tuple(position[m][node] for node in roots[m]) for m in range(hops + 1))
    return Plan(tuple(levels), tuple(edges), read_out)


def layers_below(graph: Graph, block: Block) -> tuple[str, ...]:
    """Return the weight layers within the block's hop count of its root: all that its root embedding depends on."""
    ring = {block.root}
    reached = set(ring)
    for _ in range(block.hops):
        ring = {source for source, target in graph.edges if target in ring}
        reached |= ring
    return tuple(node.layer for node in graph.nodes if node.id in reached and node.layer is not None)
