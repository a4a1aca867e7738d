"""The network of the graph surrogate: encoder, GATv2 layers, root read-out per hop, regressor."""

import numpy as np
import torch
from torch import Tensor, nn

from quantdm.schemes import ORIGINAL_BITS
from quantdm.surrogates.plan import Plan
from quantdm.surrogates.space import SearchSpace

WIDTH, ENCODED = 64, 16
DEPTH_BINS = 16


class CellTable(nn.Module):
    """The features of every cell a node can hold: L·O cells of (layer, option), then one per combine node."""

    index: Tensor  # [cells, 5] method, bits, operation type, stage, depth bin
    value: Tensor  # [cells, 3] compression, log weight error, log noise error, standardised over the weight cells

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        layers, options = space.bits.shape
        node_of = {node.layer: node for node in space.graph.nodes if node.layer is not None}
        nodes = [node_of[name] for name in space.layer_names for _ in range(options)]
        nodes += [node for node in space.graph.nodes if node.layer is None]
        methods = [(o.method, o.granularity, o.group_size) for o in space.options]
        # 0 is "no method", "no bits": combine nodes
        method = [1 + sorted(set(methods), key=str).index(m) for m in methods] * layers
        bits = [option.bits for option in space.options] * layers
        rest = len(nodes) - space.bits.size
        types = sorted({node.op_type for node in space.graph.nodes})
        stages = sorted({node.stage for node in space.graph.nodes})
        columns = [
            method + [0] * rest,
            bits + [0] * rest,
            [types.index(node.op_type) for node in nodes],
            [stages.index(node.stage) for node in nodes],
            [min(int(node.depth * DEPTH_BINS), DEPTH_BINS - 1) for node in nodes],
        ]
        compression = space.bits / (ORIGINAL_BITS * space.num_weights[:, None])
        cells = [np.minimum(compression, 2.0), _log(space.weight_error), _log(space.noise_error)]
        value = np.zeros((len(nodes), len(cells)))
        for column, cell in enumerate(cells):
            value[: space.bits.size, column] = ((cell - cell.mean()) / max(cell.std(), 1e-9)).ravel()
        self.register_buffer("index", torch.tensor(columns, dtype=torch.long).T.contiguous(), persistent=False)
        self.register_buffer("value", torch.tensor(value, dtype=torch.float32), persistent=False)

    @property
    def sizes(self) -> list[int]:
        """Number of distinct values of every indexed feature."""
        return [int(size) + 1 for size in self.index.max(dim=0).values]


def _log(error: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(error, 1e-9 * error.max()))


class GraphNet(nn.Module):
    """Embed the nodes of a batch of configurations and read the roots out.

    All activations are >= 0, so the L1 norm of a mean over roots is the mean of their L1 norms: the score of every hop
    is exactly additive over roots.
    """

    def __init__(self, table: CellTable, hops: int) -> None:
        from torch_geometric.nn import GATv2Conv

        super().__init__()
        self.table = table
        self.embeddings = nn.ModuleList(
            nn.Embedding(size, width) for size, width in zip(table.sizes, (5, 5, 10, 10, 10), strict=True)
        )
        self.values = nn.ModuleList(nn.Linear(1, 5) for _ in range(table.value.shape[1]))
        width = 40 + 5 * table.value.shape[1]
        # The cells are always encoded all together, so their own statistics serve in training and afterwards alike.
        self.encoder = nn.Sequential(
            nn.BatchNorm1d(width, track_running_stats=False),
            nn.ReLU(),
            nn.Linear(width, WIDTH),
            nn.BatchNorm1d(WIDTH, track_running_stats=False),
            nn.ReLU(),
            nn.Linear(WIDTH, ENCODED),
            nn.BatchNorm1d(ENCODED, track_running_stats=False),
            nn.ReLU(),
        )
        widths = [ENCODED] + [WIDTH] * hops
        self.convs = nn.ModuleList(GATv2Conv(a, WIDTH, add_self_loops=False) for a in widths[:-1])
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(hops))
        self.regressor = nn.Sequential(nn.Linear(widths[-1], 32), nn.ReLU(), nn.Linear(32, 1))

    def encode(self) -> Tensor:
        """Return the embedding of every cell: [cells, 16]."""
        index, value = self.table.index, self.table.value
        parts = [embedding(column) for embedding, column in zip(self.embeddings, index.T, strict=True)]
        parts += [linear(value[:, i : i + 1]) for i, linear in enumerate(self.values)]
        return self.encoder(torch.cat(parts, dim=1))

    def forward(self, cells: Tensor, plan: Plan, edges: list[Tensor], encoded: Tensor | None = None) -> list[Tensor]:
        """Return the root embeddings of every hop: [roots, B, width] for m = 0 ... hops.

        Args:
            cells: the cell of every node of plan.levels[0] in every configuration [nodes, B].
            plan: what to compute.
            edges: `plan.batched_edges(B)`.
            encoded: `encode()`, when it is known already.
        """
        batch = cells.shape[1]
        h = (self.encode() if encoded is None else encoded)[cells]  # [nodes, B, 16]
        found = [h[list(plan.roots[0])]]
        for m in range(1, plan.hops + 1):
            own = h[plan.kept[m - 1]]
            flat, own_flat = h.flatten(0, 1), own.flatten(0, 1)
            out = self.norms[m - 1](self.convs[m - 1]((flat, own_flat), edges[m - 1])).relu()
            h = out.view(-1, batch, WIDTH) + (own if m > 1 else 0)
            found.append(h[list(plan.roots[m])])
        return found


def hop_scores(roots: list[Tensor]) -> Tensor:
    """Return ‖h_G^m‖₁, the L1 norm of the mean over roots, of every hop that has roots: [B, M]."""
    return torch.stack([h.mean(dim=0).abs().sum(dim=1) for h in roots if len(h)], dim=1)
