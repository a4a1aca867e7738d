"""Explainers that only ask for predictions: exact where the truth is additive, and honest about agreement."""

import numpy as np
import pytest

from quantdm.errors import QuantDMError
from quantdm.surrogates import (
    RidgeSurrogate,
    TreeSurrogate,
    agreement,
    agreement_with_truth,
    attribute,
    explain_by_shapley,
    explain_by_swaps,
)
from tests.planted import PlantedTruth, planted_space

EXPLAINERS = [explain_by_swaps, explain_by_shapley]


@pytest.fixture(scope="module")
def space():
    return planted_space()


@pytest.fixture(scope="module")
def truth(space):
    return PlantedTruth(space)


@pytest.fixture(scope="module")
def trials(truth):
    return truth.trials(120)


@pytest.fixture(scope="module")
def ridge(space, trials):
    return RidgeSurrogate(space).fit(*trials)


class Oracle:
    """A surrogate that predicts what it is told to."""

    name = "oracle"

    def __init__(self, space, predict):
        self.space, self.predict = space, predict


@pytest.mark.parametrize("explain", EXPLAINERS)
def test_explainers_return_the_terms_of_an_additive_surrogate(explain, ridge, trials):
    exact = ridge.fold_values()[0]
    exact = exact - exact.mean(axis=1, keepdims=True)
    found = explain(ridge, trials[0], samples=4)
    assert found.values == pytest.approx(exact, abs=1e-9)
    assert found.spread.max() < 1e-9
    assert found.source.startswith("ridge: ")
    assert found.layers == ridge.space.layer_names


def test_a_shapley_walk_sums_to_the_difference_of_its_ends(space, truth):
    """Two trials only, so every walk joins them: what the layers' own options are worth adds up to y(x) - y(z)."""
    x, z = truth.trials(2, seed=4)[0]
    found = explain_by_shapley(Oracle(space, truth.y), np.stack([x, z]), samples=8)
    rows = np.arange(len(x))
    assert (found.values[rows, x] - found.values[rows, z]).sum() == pytest.approx(
        float(truth.y(x)[0] - truth.y(z)[0]), abs=1e-9
    )


def test_shapley_shares_an_interaction_equally_and_swaps_do_not(space):
    """y = 1 only if two layers both leave option 0: from (0, 0), no single swap shows it; Shapley gives each half."""
    a, b = 3, 7

    def y(choices):
        return ((choices[:, a] > 0) & (choices[:, b] > 0)).astype(float)

    low = np.zeros(len(space.layers), dtype=np.int64)
    oracle = Oracle(space, y)
    assert np.ptp(explain_by_swaps(oracle, low[None]).values) == 0
    values = explain_by_shapley(oracle, np.stack([low, low + 1]), samples=8).values
    assert values[a, 1] - values[a, 0] == pytest.approx(0.5)
    assert values[b, 1] - values[b, 0] == pytest.approx(0.5)
    assert np.ptp(np.delete(values, [a, b], axis=0)) == 0


def test_the_standard_error_falls_with_more_samples(space, truth, trials):
    few, many = (explain_by_shapley(Oracle(space, truth.y), trials[0], samples=n, seed=1).spread for n in (8, 72))
    assert np.median(many) == pytest.approx(np.median(few) / 3, rel=0.35)


@pytest.mark.parametrize("explain", EXPLAINERS)
def test_same_seed_same_explanation(explain, space, trials, truth):
    one, again, other = (explain(Oracle(space, truth.y), trials[0], samples=4, seed=seed) for seed in (0, 0, 1))
    assert (one.values == again.values).all()
    assert (one.values != other.values).any()


def test_explanations_of_one_tree_agree_with_each_other_and_with_measured_swaps(space, truth):
    choices, y = truth.trials(300)
    tree = TreeSurrogate(space).fit(choices, y)
    found = {
        "attribution": attribute(tree),
        "swap one": explain_by_swaps(tree, choices[150:], samples=8),
        "Shapley": explain_by_shapley(tree, choices[150:], samples=8),
    }
    rows = agreement(found)
    assert [(row["a"], row["b"]) for row in rows] == [
        ("attribution", "swap one"), ("attribution", "Shapley"), ("swap one", "Shapley"),
    ]  # fmt: skip
    assert min(row["values"] for row in rows) > 0.9
    assert min(row["importance"] for row in rows) > 0.85
    reference = choices[200]
    layer = np.repeat(np.arange(0, len(reference), 2), 3)
    option = np.tile([0, 4, 8], len(layer) // 3)
    swapped = np.repeat(reference[None], len(layer), axis=0)
    swapped[np.arange(len(layer)), layer] = option
    delta = truth.y(swapped) - truth.y(reference)
    for one in found.values():
        judged = agreement_with_truth(one, layer, option, delta, reference=reference)
        assert judged["swaps"] == len(layer)
        assert judged["layers"] == len(np.unique(layer))
        assert judged["values"] > 0.9
        assert judged["importance"] > 0.75
    shuffled = np.random.default_rng(0).permutation(delta)
    assert abs(agreement_with_truth(found["Shapley"], layer, option, shuffled, reference=reference)["values"]) < 0.35


def test_bad_requests_are_one_clear_error(space, truth, trials, ridge):
    oracle, found = Oracle(space, truth.y), attribute(ridge)
    with pytest.raises(QuantDMError, match="belong to another model"):
        explain_by_swaps(oracle, trials[0][:, :-1])
    with pytest.raises(QuantDMError, match="expected one or more"):
        explain_by_swaps(oracle, trials[0], samples=0)
    with pytest.raises(QuantDMError, match="at least 4"):
        explain_by_shapley(oracle, trials[0], samples=3)
    with pytest.raises(QuantDMError, match="two or more"):
        agreement({"one": found})
    own = trials[0][0]
    with pytest.raises(QuantDMError, match="expected one length"):
        agreement_with_truth(found, [0, 1], [0], [0.1, 0.2], reference=own)
    with pytest.raises(QuantDMError, match="option must hold positions from 0 to 8"):
        agreement_with_truth(found, [0, 1], [0, 9], [0.1, 0.2], reference=own)
    with pytest.raises(QuantDMError, match="1 of delta_y are NaN"):
        agreement_with_truth(found, [0, 1], [0, 8], [0.1, np.nan], reference=own)
    with pytest.raises(QuantDMError, match="expected one option for"):
        agreement_with_truth(found, [0, 1], [0, 8], [0.1, 0.2], reference=own[:-1])
