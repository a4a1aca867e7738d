"""Explaining one configuration: shares of layers that sum to the predicted difference, for every surrogate."""

from itertools import permutations

import numpy as np
import pytest

from quantdm.allocation.sampling import sample_configs
from quantdm.errors import QuantDMError
from quantdm.surrogates import AdditiveSurrogate, GraphSurrogate, RidgeSurrogate, TreeSurrogate, explain_one
from quantdm.surrogates.additive_model import head_of
from quantdm.surrogates.local import log_rate
from quantdm.surrogates.meeting import FEATURES
from quantdm.surrogates.ranking import spearman
from quantdm.surrogates.two_points import shapley_of_trees, trees_of
from tests.planted import MeetingTruth, planted_space
from tests.test_surrogates import OnDemand

KINDS = {"additive": AdditiveSurrogate, "ridge": RidgeSurrogate, "tree": TreeSurrogate, "graph": GraphSurrogate}


@pytest.fixture(scope="module")
def space():
    return planted_space()


@pytest.fixture(scope="module")
def truth(space):
    return MeetingTruth(space, "coherent")


@pytest.fixture(scope="module")
def fitted(space, truth):
    trials = truth.trials(120)
    return OnDemand(lambda name: KINDS[name](space).fit(*trials))


@pytest.fixture(scope="module")
def pair(space):
    """Two configurations that share every fifth layer."""
    x, reference = sample_configs(space, 2, seed=5)
    x[::5] = reference[::5]
    return x, reference


@pytest.mark.parametrize("name", KINDS)
def test_shares_sum_to_the_difference_change_sign_and_are_nothing_where_options_agree(fitted, pair, name):
    x, reference = pair
    surrogate = fitted[name]
    there, back = explain_one(surrogate, x, reference), explain_one(surrogate, reference, x)
    base, predicted = surrogate.predict(np.stack([reference, x]))
    assert (there.base, there.predicted) == (base, predicted)
    assert abs(there.difference) > 0.05
    assert there.contributions.sum() == pytest.approx(predicted - base, abs=1e-5)
    assert there.contributions == pytest.approx(-back.contributions, abs=1e-9)
    assert (there.contributions[x == reference] == 0).all()
    assert (np.abs(there.contributions[x != reference]) > 0).mean() > 0.9
    assert there.spread.max() > 0
    assert there.share(there.ranked()) == pytest.approx(1)
    assert there.share(there.ranked(5)) < 1
    assert not explain_one(surrogate, x, x).contributions.any()


def test_every_fold_explains_its_own_prediction(fitted, pair):
    for name in ("additive", "graph"):
        folds = fitted[name].predict_folds(np.stack(pair))
        assert fitted[name].split_difference(*pair).sum(axis=1) == pytest.approx(folds[:, 0] - folds[:, 1], abs=1e-9)


def test_shapley_values_of_a_block_equal_the_mean_over_all_orders(fitted, space, pair):
    x, reference = pair
    surrogate = fitted["graph"]
    net, theta = surrogate.net, surrogate.thetas[0]
    layers = max(net.wiring.blocks, key=lambda block: (x[list(block)] != reference[list(block)]).sum())

    def cost(choice):
        return sum(part.sum() for part in net.energies(theta, choice[None]))

    by_hand, orders = np.zeros(len(x)), list(permutations(layers))
    for order in orders:
        choice = reference.copy()
        for layer in order:
            before = cost(choice)
            choice[layer] = x[layer]
            by_hand[layer] += (cost(choice) - before) / len(orders)
    _, b, _, c = head_of(theta)
    by_hand *= log_rate(b, c + cost(x), c + cost(reference))
    assert explain_one(surrogate, x, reference).contributions[list(layers)] == pytest.approx(by_hand[list(layers)])


def test_secants_agree_with_exact_shapley_values_and_say_what_a_term_is_made_of(fitted, space):
    surrogate, agree = fitted["graph"], []
    for x, reference in sample_configs(space, 12, seed=3).reshape(6, 2, -1):
        parts = surrogate.split_features(x, reference)
        assert parts.shape[2] == len(FEATURES)
        exact = surrogate.split_difference(x, reference)
        assert parts.sum(axis=(1, 2)) == pytest.approx(exact.sum(axis=1), abs=1e-9)
        agree.append(spearman(parts[0].sum(axis=1), exact[0]))
        back = surrogate.split_features(reference, x)
        assert parts == pytest.approx(-back, abs=1e-9)
    assert min(agree) >= 0.95


def test_additive_shares_are_the_mean_over_orders_in_the_limit(fitted, pair):
    """Aumann-Shapley: many small steps of all layers together along the line of S."""
    x, reference = pair
    surrogate = fitted["additive"]
    values = surrogate.fold_values()[0]  # in proportion to the terms of S
    rows = np.arange(len(x))
    step = values[rows, x] - values[rows, reference]
    found = explain_one(surrogate, x, reference).contributions
    assert found / found.sum() == pytest.approx(step / step.sum())


def test_two_point_values_of_trees_equal_brute_force(fitted, pair):
    tree = fitted["tree"]
    x, reference = tree.features.transform(np.stack(pair))
    trees = trees_of(tree._boosters[0])[:3]

    def leaf(one, point):
        node = 0
        while one.left[node] >= 0:
            small = np.float32(point[one.feature[node]]) < np.float32(one.limit[node])
            node = one.left[node] if small else one.right[node]
        return one.limit[node]

    for one in trees:
        used = sorted({f for f, child in zip(one.feature, one.left, strict=True) if child >= 0})
        by_hand, orders = np.zeros(len(x)), list(permutations(used))
        for order in orders:
            point = reference.copy()
            for feature in order:
                before = leaf(one, point)
                point[feature] = x[feature]
                by_hand[feature] += (leaf(one, point) - before) / len(orders)
        assert shapley_of_trees([one], x, reference) == pytest.approx(by_hand, abs=1e-12)


def test_shares_rank_layers_as_the_truth_does(fitted, truth, space):
    """Restoring the layers that cost most, as they are named, restores most of the noiseless truth."""
    x, reference = np.zeros(len(space.layers), dtype=np.int64), np.full(len(space.layers), len(space.options) - 1)
    explained = explain_one(fitted["graph"], x, reference)
    assert explained.difference < 0
    gained = []
    for layers in (explained.ranked(10), explained.ranked()[-10:]):
        restored = x.copy()
        restored[layers] = reference[layers]
        gained.append(truth.y(restored)[0] - truth.y(x)[0])
    assert gained[0] > 3 * gained[1]


def test_configurations_of_another_space_are_one_clear_error(fitted, pair):
    x, reference = pair
    for name in KINDS:
        with pytest.raises(QuantDMError, match="belong to another model"):
            explain_one(fitted[name], x[:-1], reference)
        with pytest.raises(QuantDMError, match="expected 0 to 8"):
            explain_one(fitted[name], x, np.full(len(x), 9))
        with pytest.raises(QuantDMError, match="got 2 and 1 configurations"):
            explain_one(fitted[name], np.stack(pair), reference)
        with pytest.raises(QuantDMError, match="not fitted"):
            explain_one(KINDS[name](fitted[name].space), x, reference)
