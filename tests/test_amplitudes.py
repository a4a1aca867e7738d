"""The network of the graph surrogate: homogeneous, the sensitivity sum before it learns, and true to its messages."""

from dataclasses import replace

import numpy as np
import pytest

from quantdm.allocation.sampling import sample_configs
from quantdm.runs.explain import weights_near
from quantdm.surrogates import GraphSurrogate
from quantdm.surrogates.additive_model import AdditiveCurve, body_size, log_terms
from quantdm.surrogates.amplitudes import LOG_GATE_SD, SIGNED_MEAN, SIGNED_SD, make_net
from quantdm.surrogates.gauss_newton import Scaled, solve
from quantdm.surrogates.ranking import spearman
from quantdm.surrogates.wiring import paths_to_root, sources_of
from tests.planted import Interaction, MeetingTruth, planted_space


@pytest.fixture(scope="module")
def space():
    return planted_space()


@pytest.fixture(scope="module")
def net(space):
    return make_net(space)


@pytest.fixture(scope="module")
def theta(net):
    return 0.5 * np.random.default_rng(0).normal(size=len(net.start(0.0)))


@pytest.fixture(scope="module")
def choices(space):
    return sample_configs(space, 6, seed=1)


def messages_of(net, theta, name):
    return theta[body_size(net.design) :][net.slices[name]]


def without_channels(net, theta):
    """The same parameters with signed channels that send nothing, and independent errors."""
    quiet = theta.copy()
    messages_of(net, quiet, "signed")[:] = (-net.mean / SIGNED_SD).ravel()
    messages_of(net, quiet, "power")[:] = 0
    return quiet


def test_the_jacobian_equals_finite_differences(net, theta, choices):
    step = 1e-6
    found = net.jacobian(theta, choices)
    by_hand = np.stack(
        [
            (net.log_fid(theta + step * unit, choices) - net.log_fid(theta - step * unit, choices)) / (2 * step)
            for unit in np.eye(len(theta))
        ],
        axis=1,
    )
    assert np.abs(by_hand).max() > 1
    assert found == pytest.approx(by_hand, abs=1e-7)


def test_with_independent_errors_and_no_messages_it_is_the_sensitivity_sum(net, space, choices):
    alone, roots = net.energies(without_channels(net, net.start(0.0)), choices)
    noise = space.gather(space.noise_error, choices).sum(axis=1)
    cost = alone.sum(axis=1) + roots.sum(axis=1)
    assert cost / noise == pytest.approx(np.full(len(cost), cost[0] / noise[0]))


def test_terms_k_times_as_large_cost_k_times_as_much(net, theta, choices):
    log_term = log_terms(net.design, theta)[np.arange(choices.shape[1]), choices]
    said = net.messages(theta)
    for index, layers in enumerate(net.wiring.blocks):
        one, more = (net.root_energy(index, log_term[:, layers] + np.log(k), said) for k in (1.0, 7.0))
        assert more == pytest.approx(7 * one)


@pytest.mark.parametrize(("power", "expected"), [(1.0, "coherent"), (2.0, "independent"), (40.0, "the worst")])
def test_the_power_says_how_errors_meet(net, theta, choices, power, expected):
    quiet = without_channels(net, theta)
    term = np.exp(log_terms(net.design, quiet)[np.arange(choices.shape[1]), choices])
    said = replace(net.messages(quiet), power=np.full(len(net.wiring.blocks), power))
    for index, layers in enumerate(net.wiring.blocks):
        part, size = term[:, layers], len(layers)
        by_hand = {
            "coherent": np.sqrt(part).sum(axis=1) ** 2 / size,
            "independent": part.sum(axis=1),
            "the worst": size * part.max(axis=1),
        }
        assert net.root_energy(index, np.log(part), said) == pytest.approx(by_hand[expected], rel=0.08)


def test_roots_hear_what_messages_carry_along_the_graph(net, theta, space):
    """h_v = own_v + sum of g · h_u, hop by hop, where only one layer sends: its signed amplitude at the root."""
    sources, said = sources_of(space.graph), net.messages(theta)
    gate = np.exp(LOG_GATE_SD * messages_of(net, theta, "gate").reshape(len(net.wiring.types), -1))
    own, weight = net._own(theta)
    for block in space.graph.blocks:
        for name in block.layers if len(block.layers) > 1 else ():
            layer = space.layer_index[name]
            h = dict.fromkeys(sources, np.zeros(gate.shape[1]))
            for _ in range(block.hops + 1):
                h = {
                    v: (own[layer] if space.graph.nodes[v].layer == name else 0)
                    + sum((gate[net.wiring.types.index(space.graph.nodes[v].op_type)] * h[u] for u in before), 0.0)
                    for v, before in sources.items()
                }
            assert said.signed[layer] == pytest.approx(weight[layer] * h[block.root])
    assert SIGNED_MEAN > 0


def test_a_root_depends_on_its_block_only(space):
    for block in space.graph.blocks:
        reached = {
            space.graph.nodes[path[-1]].layer for path in paths_to_root(space.graph, block, sources_of(space.graph))
        }
        assert reached == set(block.layers)


@pytest.mark.parametrize("kind", ["coherent", "worst", "amplified"])
def test_where_errors_interact_the_network_ranks_ahead_of_the_additive_model(space, net, kind: Interaction):
    """200 random trials with label noise; judged near 3 bits by the noiseless truth, at one strength."""
    ranks = []
    for seed in range(3):
        truth = MeetingTruth(space, kind, seed=seed)
        (x, y), held_out = truth.trials(200, seed=seed), truth.near(200)
        curves = (net, AdditiveCurve(net.design))
        fitted = [curve.log_fid(solve(curve, x, -y, np.ones(200), 3.0), held_out) for curve in curves]
        ranks.append([spearman(-found, truth.y(held_out)) for found in fitted])
    alone, additive = np.mean(ranks, axis=0)
    assert alone >= 0.97
    assert alone > additive + 0.001


def test_it_learns_how_errors_meet(space, net):
    found = {}
    for kind in ("coherent", "none", "worst"):
        x, y = MeetingTruth(space, kind).trials(300)
        found[kind] = net.messages(solve(net, x, -y, np.ones(300), 3.0)).power.mean()
    assert found["coherent"] < 1.6 < found["none"] < found["worst"]
    assert found["worst"] > 3


def test_held_back_parameters_keep_to_their_prior(space, net, theta, choices):
    scale = np.ones(len(theta))
    scale[body_size(net.design) :] = 0.1
    held = Scaled(net, scale)
    assert held.log_fid(theta, choices) == pytest.approx(net.log_fid(scale * theta, choices))
    step = 1e-6 * np.random.default_rng(1).normal(size=len(theta))
    change = (held.log_fid(theta + step, choices) - held.log_fid(theta - step, choices)) / 2
    assert held.jacobian(theta, choices) @ step == pytest.approx(change, rel=1e-4, abs=1e-12)
    truth = MeetingTruth(space, "worst")
    trials, y = truth.trials(100)
    free, tight = (solve(curve, trials, -y, np.ones(100), 3.0) for curve in (net, held))
    tight = scale * tight
    sizes = [np.abs(found[body_size(net.design) :]).mean() for found in (tight, free)]
    assert sizes[0] < 0.3 * sizes[1]


def test_where_only_the_worst_counts_messages_are_left_free(space):
    found = GraphSurrogate(space).fit(*MeetingTruth(space, "worst").trials(200))
    assert found.looseness_ == 1.0
    assert GraphSurrogate.from_dict(found.to_dict(), space).looseness_ == 1.0


def test_trials_near_the_target_weigh_most(space):
    trials = sample_configs(space, 200, seed=0)
    weights, apart = weights_near(space, trials, 3.0), np.abs(space.avg_bits(trials) - 3.0)
    assert (np.diff(weights[np.argsort(apart)]) <= 1e-12).all()
    assert weights.max() <= 5
    assert weights[apart > 1.6] == pytest.approx(1, abs=0.03)
