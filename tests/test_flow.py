"""Which edges of a denoiser carry damage: planted paths through a small real DiT, and full precision on edges."""

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel

from quantdm.denoisers.analysis import trace_graph
from quantdm.denoisers.calls import Call
from quantdm.denoisers.flow import record_flow
from quantdm.metrics import relative_error
from quantdm.runs.paths import carrying_edges
from quantdm.surrogates import AdditiveSurrogate
from quantdm.surrogates.smallest_set import carrying_layers, smallest_set
from tests.planted import PlantedTruth, planted_space

TRUNK_END = "proj_out_2"


def make_denoiser():
    """Return a DiT of two blocks; the branches of the second hardly add to the trunk, so that is where damage runs."""
    torch.manual_seed(0)
    denoiser = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2
    ).eval()
    with torch.no_grad():
        for layer in (denoiser.transformer_blocks[1].attn1.to_out[0], denoiser.transformer_blocks[1].ff.net[2]):
            layer.weight.mul_(1e-3)
            layer.bias.mul_(1e-3)
    return denoiser


@pytest.fixture(scope="module")
def watched():
    denoiser = make_denoiser()
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([400, 400]),
        "class_labels": torch.tensor([1, 2]),
    }
    with torch.no_grad():
        output = denoiser(**inputs).sample
    return denoiser, record_flow(denoiser, Call((), inputs, output))


@pytest.fixture
def damaged(watched):
    """Return a function that damages layers of the denoiser, which are themselves again after the test."""
    denoiser, _ = watched
    kept = {name: value.clone() for name, value in denoiser.state_dict().items()}

    def damage(*names):
        with torch.no_grad():
            for name in names:
                weight = denoiser.get_parameter(f"{name}.weight")
                weight.add_(0.3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))

    yield damage
    denoiser.load_state_dict(kept)


def test_a_real_forward_has_the_data_flow_that_was_traced(watched):
    denoiser, flow = watched
    graph = trace_graph(denoiser)
    assert [node.name for node in flow.graph.nodes] == [node.name for node in graph.nodes]
    assert flow.graph.edges == graph.edges
    drawn = [edge for found in flow.edges for edge in found.drawn]
    fused = {(a, b) for a, b in graph.edges if {graph.nodes[a].op_type, graph.nodes[b].op_type} == {"product"}}
    assert set(drawn) == set(graph.edges) - fused  # every edge but that inside a fused attention carries a tensor
    assert len({(edge.source, edge.target) for edge in flow.edges}) == len(flow.edges)


def test_full_precision_on_every_edge_leaves_the_own_damage_of_the_last_layers(watched, damaged):
    denoiser, flow = watched
    reference = flow.call.output
    every = range(len(flow.edges))
    assert torch.equal(flow.run(denoiser, ()), reference)
    assert torch.equal(flow.run(denoiser, every), reference)
    damaged("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.0.proj")
    with torch.no_grad():
        plain = denoiser(**flow.call.kwargs).sample
    assert torch.equal(flow.run(denoiser, ()), plain)
    assert relative_error(plain, reference) > 1e-6
    assert torch.equal(flow.run(denoiser, every), reference)  # the last layer is whole, and reads whole tensors
    damaged(TRUNK_END)
    assert relative_error(flow.run(denoiser, every), reference) > 1e-4


@pytest.mark.parametrize(
    ("layer", "branch"),
    [
        ("transformer_blocks.0.ff.net.2", 1),
        ("transformer_blocks.0.attn1.to_v", 3),  # values, product, output, sum
    ],
)
def test_the_planted_path_is_found_and_nothing_else(watched, damaged, layer, branch):
    denoiser, flow = watched
    damaged(layer)
    found = carrying_edges(denoiser, [flow])
    graph, names = flow.graph, [node.name for node in flow.graph.nodes]
    below = {names.index(layer)}
    for a, b in graph.edges:  # in topological order of their sources
        if a in below:
            below.add(b)
    touched = [edge for edge in range(len(flow.edges)) if abs(found.single[edge]) > 1e-9]
    assert all(flow.edges[edge].drawn[0][0] in below for edge in touched)  # damage runs downstream only
    members = [flow.edges[edge] for edge in found.members]
    ends = {end for edge in members for pair in edge.drawn for end in pair}
    assert names.index(layer) in ends
    assert names.index(TRUNK_END) in ends
    reached = {names.index(layer)}  # the set alone leads from the layer to the output
    for a, b in sorted(pair for edge in members for pair in edge.drawn):
        if a in reached:
            reached.add(b)
    assert names.index(TRUNK_END) in reached
    assert found.undone - found.missing >= 0.8
    assert len(members) < 0.4 * len(flow.edges)
    leaving = [edge for edge in members if names.index(layer) in {a for a, _ in edge.drawn}]
    assert len(leaving) == 1
    assert branch <= len(members)


def test_the_smallest_set_of_damages_that_add_up_is_the_top_of_the_ranking():
    amounts = np.array([5.0, 0.0, 1.0, 3.0, -1.0, 0.5])
    found = smallest_set(6, lambda restored: float(np.delete(amounts, list(restored)).sum()))
    assert found.order == (0, 3, 2, 5, 4)
    assert found.single == pytest.approx(amounts / amounts.sum())
    assert found.members == (0, 3)  # 8 of 8.5; both needed and enough: undone - missing is 2 · 8 / 8.5 - 1
    assert found.undone == pytest.approx(8 / 8.5)
    assert found.missing == pytest.approx(1 - 8 / 8.5)
    assert smallest_set(3, lambda restored: 1.0).members == ()


def test_the_layers_that_carry_a_predicted_difference_are_those_that_contribute_most():
    space = planted_space()
    surrogate = AdditiveSurrogate(space).fit(*PlantedTruth(space).trials(120))
    x, reference = (np.full(len(space.layers), space.labels.index(f"kmeans-channel-{bits}")) for bits in (2, 4))
    found = carrying_layers(surrogate, x, reference)
    back = carrying_layers(surrogate, reference, x)
    largest = np.argsort(surrogate.split_difference(x, reference)[0])
    assert set(found.members) == set(largest[: found.size].tolist())
    assert 1 < found.size < len(space.layers)
    assert set(back.members) & set(found.members)
