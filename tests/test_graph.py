"""The traced graph: acyclic, connected, and blocks that are exactly the in-neighbourhoods of their roots."""

import json
from collections import Counter

import diffusers
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from quantdm.denoisers.analysis import trace_graph
from quantdm.denoisers.graph import Graph
from quantdm.errors import QuantDMError
from tests.architectures import DIGITS, PUBLIC

MODELS = {
    **PUBLIC,
    **DIGITS,
    "unet2d": ("UNet2DModel", {"sample_size": 32, "block_out_channels": (32, 64, 64, 64), "norm_num_groups": 8}),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "num_layers": 3, "sample_size": 32, "num_attention_heads": 4, "attention_head_dim": 16,
            "joint_attention_dim": 64, "caption_projection_dim": 64, "pooled_projection_dim": 64,
            "qk_norm": "rms_norm", "dual_attention_layers": (0,),
        },
    ),
    "flux": (
        "FluxTransformer2DModel",
        {
            "num_layers": 2, "num_single_layers": 2, "in_channels": 4, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (4, 4, 8),
            "guidance_embeds": True,
        },
    ),
}  # fmt: skip


def graph_of(name: str) -> Graph:
    cls, config = MODELS[name]
    with torch.device("meta"):
        return trace_graph(getattr(diffusers, cls)(**config))


def upstream(graph: Graph) -> dict[int, set[int]]:
    sources: dict[int, set[int]] = {n.id: set() for n in graph.nodes}
    for a, b in graph.edges:
        sources[b].add(a)
    return sources


def weights_within(graph: Graph, root: int, hops: int) -> set[str]:
    """The weight layers in the in-neighbourhood of `root`, by the definition: repeated one-step expansion."""
    sources, reached = upstream(graph), {root}
    for _ in range(hops):
        reached |= {s for i in reached for s in sources[i]}
    return {layer for i in reached if (layer := graph.nodes[i].layer) is not None}


class Odd(ModelMixin, ConfigMixin):
    """A layer applied twice in a row, one that is never called, a sum written through a view, an unread statistic."""

    @register_to_config
    def __init__(self, in_channels: int = 4) -> None:
        super().__init__()
        self.proj_in = nn.Linear(in_channels, 8)
        self.again = nn.Linear(8, 8)
        self.idle = nn.Linear(8, 8)
        self.side = nn.Linear(4, 4)
        self.proj_out = nn.Linear(8, in_channels)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        x = self.proj_in(hidden_states)
        x = self.again(nn.functional.relu(self.again(x)))
        canvas = torch.zeros_like(x)
        canvas[..., :4] = x[..., :4]
        side = self.side(x[..., 4:])
        canvas[..., 4:] += side
        _ = x.mean() + side.mean()  # a statistic that nothing reads
        return self.proj_out(canvas)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_the_in_neighbourhoods_of_their_roots(name: str) -> None:
    graph = graph_of(name)
    for block in graph.blocks:
        assert weights_within(graph, block.root, block.hops) == set(block.layers), block
        assert 0 <= block.hops <= 4
        if block.hops:
            assert weights_within(graph, block.root, block.hops - 1) < set(block.layers)
    layers = [n.layer or "" for n in graph.nodes if n.kind == "weight"]
    assert sorted(layer for b in graph.blocks for layer in b.layers) == sorted(layers)
    assert len(set(layers)) == len(layers)
    assert len({b.name for b in graph.blocks}) == len(graph.blocks)
    assert all(n.layer in graph.blocks[n.block].layers for n in graph.nodes if n.layer is not None)


@pytest.mark.parametrize("name", MODELS)
def test_graph_is_acyclic_and_connected(name: str) -> None:
    graph = graph_of(name)
    assert [n.id for n in graph.nodes] == list(range(len(graph.nodes)))
    assert all(a < b for a, b in graph.edges)  # ids are a topological order, so there is no circle
    assert len(set(graph.edges)) == len(graph.edges)
    neighbours: dict[int, set[int]] = {n.id: set() for n in graph.nodes}
    for a, b in graph.edges:
        neighbours[a].add(b)
        neighbours[b].add(a)
    reached, todo = {0}, [0]
    while todo:
        fresh = neighbours[todo.pop()] - reached
        reached |= fresh
        todo.extend(fresh)
    assert len(reached) == len(graph.nodes)
    assert [n.depth for n in graph.nodes] == sorted(n.depth for n in graph.nodes)
    assert (graph.nodes[0].depth, graph.nodes[-1].depth) == (0.0, 1.0)
    sources = upstream(graph)
    assert all(sources[n.id] for n in graph.nodes if n.kind == "combine")
    assert len({n.name for n in graph.nodes}) == len(graph.nodes)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_through_json(name: str) -> None:
    graph = graph_of(name)
    assert Graph.from_dict(json.loads(json.dumps(graph.to_dict()))) == graph


def test_hops_are_those_of_the_paper() -> None:
    def hops(name: str, ending: str) -> set[tuple[int, int]]:
        return {(b.hops, len(b.layers)) for b in graph_of(name).blocks if b.name.endswith(ending)}

    for name in ("pixart-xl-2", "hunyuan-dit", "sdxl", "sd-1.5"):  # q, k, v, out; two feed-forward layers
        assert hops(name, ".attn1") == hops(name, ".attn2") == {(3, 4)}
        assert hops(name, ".ff") == {(1, 2)}
    assert hops("dit-xl-2", ".attn1") == {(3, 4)}
    assert hops("pixart-xl-2", "adaln_single") == {(2, 3)}
    assert hops("pixart-xl-2", "caption_projection") == {(1, 2)}
    assert hops("pixart-xl-2", "pos_embed.proj") == hops("pixart-xl-2", "proj_out") == {(0, 1)}
    for name in ("sdxl", "sd-1.5", "unet2d"):  # plain, and with a shortcut: rooted in the residual sum
        graph = graph_of(name)
        resnets = [b for b in graph.blocks if ".resnets." in b.name]
        assert {(b.hops, len(b.layers)) for b in resnets} == {(1, 3), (2, 4)}
        assert all((graph.nodes[b.root].kind == "combine") == (b.hops == 2) for b in resnets)


def test_attention_is_query_key_product_then_value_product() -> None:
    graph = graph_of("digits-dit")
    sources = upstream(graph)
    by_layer = {n.layer: n.id for n in graph.nodes if n.layer is not None}
    for block in range(6):
        q, k, v, out = (by_layer[f"transformer_blocks.{block}.attn1.to_{x}"] for x in ("q", "k", "v", "out.0"))
        (values,) = sources[out]
        scores = sources[values] - {v}
        assert v in sources[values]
        assert [sources[s] for s in scores] == [{q, k}]
        assert {graph.nodes[i].op_type for i in (values, *scores)} == {"product"}
        assert {graph.nodes[i].block for i in (values, *scores)} == {graph.nodes[q].block}
        (modulation,) = sources[q]
        assert graph.nodes[modulation].op_type == "modulation"
        assert by_layer[f"transformer_blocks.{block}.norm1.linear"] in sources[modulation]


def test_combine_nodes_are_the_ones_of_a_unet() -> None:
    counts = Counter(n.op_type for n in graph_of("sdxl").nodes if n.kind == "combine")
    assert counts["concat"] == 9
    assert counts["product"] == 2 * 140
    assert set(counts) <= {"concat", "product", "add", "norm", "modulation", "border"}


def test_trace_is_cached_and_given_inputs_give_the_same_graph() -> None:
    cls, config = MODELS["digits-sd"]
    denoiser = getattr(diffusers, cls)(**config)
    assert trace_graph(denoiser) is graph_of("digits-sd")
    given = {"sample": torch.zeros(1, 4, 8, 8), "timestep": 3, "encoder_hidden_states": torch.zeros(1, 5, 160)}
    assert trace_graph(denoiser, example_inputs=given) == graph_of("digits-sd")


def test_repeated_idle_and_written_through_layers() -> None:
    graph = trace_graph(Odd())
    by_layer = {n.layer: n.id for n in graph.nodes if n.layer is not None}
    assert set(by_layer) == {"proj_in", "again", "idle", "side", "proj_out"}
    assert all(a < b for a, b in graph.edges)
    assert by_layer["proj_in"] < by_layer["again"] < by_layer["proj_out"]
    ends = {i for e in graph.edges for i in e}
    assert by_layer["idle"] not in ends
    assert {n.id for n in graph.nodes if n.kind == "combine"} <= {a for a, _ in graph.edges}
    assert by_layer["side"] in ends
    sources, seen = upstream(graph), {by_layer["proj_out"]}
    for _ in range(len(graph.nodes)):
        seen |= {s for i in seen for s in sources[i]}
    assert {graph.nodes[i].layer for i in seen} >= {"proj_in", "again", "side", "proj_out"}
    for block in graph.blocks:
        assert weights_within(graph, block.root, block.hops) == set(block.layers)


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: r.update(version=99),
        lambda r: r.pop("blocks"),
        lambda r: r["nodes"][0].pop("stage"),
        lambda r: r["edges"].append([0, 10**6]),
        lambda r: r["nodes"].pop(0),
        lambda r: r["nodes"].reverse(),
        lambda r: r["nodes"][0].update(colour="red"),
    ],
)
def test_damaged_record_is_refused(damage) -> None:
    record = graph_of("digits-dit").to_dict()
    damage(record)
    with pytest.raises(QuantDMError, match=r"graph record.*trace the denoiser again|graph record.*expected"):
        Graph.from_dict(record)
