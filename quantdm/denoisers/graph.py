"""The data-flow graph as a record: weight nodes, combine nodes, blocks with root and hops."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from quantdm.errors import QuantDMError

VERSION = 1


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
