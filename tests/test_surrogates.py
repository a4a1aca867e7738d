"""Surrogates: gradients, exact sums, planted truth, and honest failure on bad input."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score

from quantdm.allocation import select
from quantdm.allocation.sampling import sample_configs
from quantdm.errors import QuantDMError
from quantdm.schemes import QuantConfig, Scheme
from quantdm.surrogates import (
    AdditiveSurrogate,
    Attribution,
    GraphSurrogate,
    RidgeSurrogate,
    SearchSpace,
    TreeSurrogate,
    attribute,
    score_blocks,
)
from quantdm.surrogates.additive_model import head_of
from quantdm.surrogates.features import pool
from quantdm.surrogates.ranking import ndcg, relevance, spearman
from tests.planted import PlantedTruth, planted_space

KINDS = {"additive": AdditiveSurrogate, "ridge": RidgeSurrogate, "tree": TreeSurrogate, "graph": GraphSurrogate}
QUICK = {"tree": {"rounds": 20}}  # where only the mechanics are tested


@pytest.fixture(scope="module")
def space():
    return planted_space()


@pytest.fixture(scope="module")
def truth(space):
    return PlantedTruth(space)


@pytest.fixture(scope="module")
def trials(truth):
    return truth.trials(300)


class OnDemand(dict):
    """A dict that makes what it is asked for: no test waits for a surrogate that it does not use."""

    def __init__(self, make):
        self.make = make

    def __missing__(self, name):
        self[name] = self.make(name)
        return self[name]


@pytest.fixture(scope="module")
def fitted(space, trials):
    """The surrogates on 300 trials."""
    return OnDemand(lambda name: KINDS[name](space).fit(*trials))


@pytest.fixture(scope="module")
def explained(fitted):
    """Their attributions."""
    return OnDemand(lambda name: attribute(fitted[name]))


@pytest.fixture(scope="module")
def held_out(truth):
    choices, _ = truth.trials(200, seed=9)
    return choices, truth.y(choices)


def quick(name, space, **settings):
    return KINDS[name](space, **{**QUICK.get(name, {}), **settings})


# ------------------------------------------------------------------------------------------------------------- space


def test_space_survives_a_round_trip(space, tmp_path):
    space.save(tmp_path / "space.json")
    again = SearchSpace.load(tmp_path / "space.json")
    assert again.layers == space.layers
    assert again.graph == space.graph
    assert again.options == space.options
    assert again.digest == space.digest
    for name in ("bits", "weight_error", "noise_error"):
        assert (getattr(again, name) == getattr(space, name)).all()


def test_space_turns_choices_into_configs_and_back(space):
    for choice in sample_configs(space, 5, seed=0):
        assert (space.choice_of(space.config(choice)) == choice).all()
        total = sum(space.bits[i, o] for i, o in enumerate(choice))
        assert space.total_bits(choice)[0] == total
        assert space.avg_bits(choice)[0] == total / space.num_weights.sum()


def test_space_refuses_what_does_not_fit(space):
    with pytest.raises(QuantDMError, match="belong to another model"):
        space.check(np.zeros((3, 5), dtype=int))
    with pytest.raises(QuantDMError, match="expected 0 to 8"):
        space.check(np.full((1, len(space.layers)), 9))
    with pytest.raises(QuantDMError, match="expected integers"):
        space.check(np.zeros((1, len(space.layers))))
    with pytest.raises(QuantDMError, match="which is no option"):
        space.choice_of(QuantConfig(dict.fromkeys(space.layer_names, Scheme(method="log2", bits=4))))
    with pytest.raises(QuantDMError, match="1 missing layers"):
        space.choice_of(QuantConfig(dict.fromkeys(space.layer_names[1:], space.options[0])))
    with pytest.raises(QuantDMError, match="noise_error of layer"):
        SearchSpace(
            space.layers, space.graph, space.options, space.bits, space.weight_error, np.full(space.bits.shape, np.nan)
        )


# ----------------------------------------------------------------------------------------------------------- ranking


def test_rank_metrics_equal_their_definitions():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=50), rng.integers(0, 8, size=50)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman(a, np.ones(50)) == 0
    r, s = rng.random(30), rng.random(30)
    discount = 1 / np.log2(np.arange(10) + 2)
    by_hand = (r[np.argsort(-s)[:10]] * discount).sum() / (np.sort(r)[::-1][:10] * discount).sum()
    assert ndcg(r, s) == pytest.approx(by_hand)
    tied = rng.integers(0, 4, size=30)
    assert ndcg(r, tied) == pytest.approx(ndcg_score(r[None], tied[None], k=10))


def test_relevance_runs_from_0_to_50_over_the_known_labels():
    known = np.linspace(-3, -1, 101)
    assert relevance(known, known).min() == 0
    assert (relevance(known, known) == 0).mean() == pytest.approx(0.2, abs=0.02)
    assert relevance([-9.0, -1.8, 7.0], known) == pytest.approx([0, 50 * 0.8 / 1.6, 50])


# ------------------------------------------------------------------------------------------------------ planted truth


@pytest.mark.parametrize("name", KINDS)
def test_planted_truth_is_ranked(fitted, held_out, name):
    choices, y = held_out
    assert fitted[name].score(choices, y) >= 0.9
    assert fitted[name].score(choices[100:], y[100:]) >= 0.9  # those near the budget
    assert len(fitted[name].cv_scores_) == len(fitted[name].cv_ndcg_) == 5
    assert np.mean(fitted[name].cv_scores_) >= 0.85
    assert np.mean(fitted[name].cv_ndcg_) >= 0.85
    assert max(fitted[name].cv_ndcg_) <= 1


def test_additive_predicts_labels_better_than_their_noise(fitted, held_out):
    choices, y = held_out
    assert np.abs(fitted["additive"].predict(choices) - y).mean() < 0.06


def test_additive_finds_the_planted_effects(explained, space, truth):
    values = explained["additive"].values
    planted = -(truth.terms - truth.terms.mean(axis=1, keepdims=True))
    assert spearman(values.ravel(), planted.ravel()) > 0.95
    # what an operation type really costs relative to its one-layer error: the factor that only trials can teach
    ratio = np.log(np.ptp(values, axis=1) / np.ptp(space.noise_error, axis=1))
    found = {t: ratio[[layer.op_type == t for layer in space.layers]].mean() for t in truth.type_effect}
    matters = [t for t in found if sum(layer.op_type == t for layer in space.layers) > 1]
    assert spearman([found[t] for t in matters], [truth.type_effect[t] for t in matters]) >= 0.85


@pytest.mark.parametrize("name", ["additive", "tree", "graph"])
def test_planted_effects_are_ranked(explained, space, truth, name):
    """Per operation type, method and bits: every option of every type, and the options over all layers."""
    planted = -(truth.terms - truth.terms.mean(axis=1, keepdims=True))
    types = np.array([layer.op_type for layer in space.layers])
    found = explained[name]
    by_type = np.stack([planted[types == op_type].mean(axis=0) for op_type in found.by_op_type])
    assert spearman(np.array([list(row.values()) for row in found.by_op_type.values()]).ravel(), by_type.ravel()) >= 0.9
    assert spearman(found.values.mean(axis=0), planted.mean(axis=0)) >= 0.9


@pytest.mark.parametrize("name", ["additive", "tree", "graph"])
def test_selection_is_within_3_percent_of_the_true_optimum(explained, space, truth, name):
    best = truth.optimum(3.0)
    chosen = truth.y(select(space, explained[name].values, target_bits=3.0))[0]
    assert best - 0.03 * abs(best) <= chosen <= best + 1e-9


def test_ridge_selects_better_than_chance(explained, space, truth):
    """Regret in units of the gap between the optimum and random configurations of the same size."""
    random = sample_configs(space, 200, seed=3, target_bits=3.0)
    usual, best = np.median(truth.y(random[space.avg_bits(random) <= 3.0])), truth.optimum(3.0)
    assert best - truth.y(select(space, explained["ridge"].values, target_bits=3.0))[0] <= 0.15 * (best - usual)


def test_block_selection_of_the_networks_is_near_the_optimum_too(fitted, space, truth):
    zero, blocks = score_blocks(fitted["graph"])
    choice = select(space, zero.mean(axis=0), blocks=blocks, target_bits=3.0)
    assert space.avg_bits(choice)[0] <= 3.0
    # it is the best that the surrogate can predict at this size
    other = select(space, attribute(fitted["graph"]).values, target_bits=3.0)
    assert fitted["graph"].predict(choice)[0] >= fitted["graph"].predict(other)[0] - 1e-6
    assert truth.optimum(3.0) - truth.y(choice)[0] <= 0.05 * truth.optimum(3.0)


def test_the_tree_finds_the_planted_truth_on_pixart():
    """28 blocks, 287 layers, 300 trials; the graph surrogate's figures are in eval/results/planted_pixart.json."""
    space = planted_space(model="pixart-xl-2")
    truth = PlantedTruth(space)
    choices, _ = truth.trials(100, seed=9)
    found = TreeSurrogate(space).fit(*truth.trials(300))
    assert found.score(choices, truth.y(choices)) >= 0.9
    explained = attribute(found)
    planted = -(truth.terms - truth.terms.mean(axis=1, keepdims=True))
    assert spearman(explained.values.ravel(), planted.ravel()) >= 0.9
    assert spearman(explained.values.mean(axis=0), planted.mean(axis=0)) >= 0.9
    best = truth.optimum(3.0)
    assert truth.y(select(space, explained.values, target_bits=3.0))[0] >= best - 0.03 * abs(best)


def test_without_the_prior_the_tree_learns_on_its_own(space, trials, held_out):
    alone = TreeSurrogate(space, prior=False).fit(*trials)
    assert alone.score(*held_out) >= 0.9
    assert np.isfinite(alone.fold_values()).all()


@pytest.mark.parametrize("name", KINDS)
def test_shuffled_labels_teach_nothing(space, trials, name):
    choices, y = trials[0][:120], np.random.default_rng(0).permutation(trials[1][:120])
    found = KINDS[name](space).fit(choices, y)
    assert abs(np.mean(found.cv_scores_)) < 0.25


# -------------------------------------------------------------------------------------------------------- exact sums


def test_tree_contributions_and_bias_sum_to_the_prediction(fitted, held_out):
    parts = fitted["tree"].contributions(held_out[0])
    assert parts.shape[1] == len(fitted["tree"].features.names) + 2  # and the prior's, and the bias
    assert parts.sum(axis=1) == pytest.approx(fitted["tree"].predict(held_out[0]), abs=1e-4)
    assert np.ptp(parts[:, -1]) < 1e-4
    assert np.abs(parts[:, :-2]).max() > 0.01


def test_pooled_features_are_what_they_say(space, trials):
    features, choices = pool(space, logarithms=True), trials[0][:20]
    x = dict(zip(features.names, features.transform(choices).T, strict=True))
    assert x["average bits of all"] == pytest.approx(space.avg_bits(choices))
    assert np.exp(x["noise error of all"]) == pytest.approx(space.gather(space.noise_error, choices).sum(axis=1))
    shares = [column for name, column in x.items() if name.endswith("in attn1.to_q @ depth 0")]
    assert len(shares) == len(space.options)
    assert np.sum(shares, axis=0) == pytest.approx(np.ones(20))


def test_ridge_terms_sum_to_the_prediction(fitted, space, held_out):
    values = fitted["ridge"].fold_values()[0]
    parts = space.gather(values, held_out[0]).sum(axis=1)
    predicted = fitted["ridge"].predict(held_out[0])
    assert parts - parts[0] == pytest.approx(predicted - predicted[0], abs=1e-9)


def test_additive_terms_order_configurations_as_the_prediction_does(fitted, space, held_out):
    values = fitted["additive"].fold_values()[0]
    assert (values < 0).all()
    assert spearman(space.gather(values, held_out[0]).sum(axis=1), fitted["additive"].predict(held_out[0])) == 1


def test_tree_values_order_configurations_nearly_as_the_tree_does(fitted, explained, held_out):
    total = explained["tree"].total(held_out[0])
    assert spearman(total, fitted["tree"].predict(held_out[0])) > 0.95


def test_block_scores_sum_to_the_cost_that_predicts(fitted, space, held_out):
    surrogate, choices = fitted["graph"], held_out[0][:20]
    zero, blocks = score_blocks(surrogate)
    total = np.array([space.gather(values, choices).sum(axis=1) for values in zero])
    for block in blocks:
        assert len(block.assignments) == len(space.options) ** len(block.layers)
        row = {tuple(assignment): i for i, assignment in enumerate(block.assignments)}
        total += block.scores[:, [row[tuple(choice)] for choice in choices[:, block.layers]]]
    for fold, (theta, unit, predicted) in enumerate(
        zip(surrogate.thetas, surrogate.units(), surrogate.predict_folds(choices), strict=True)
    ):
        a, b, _, c = head_of(theta)
        assert -(a + b * np.log(c + total[fold] / unit)) == pytest.approx(predicted, abs=1e-9)
    cost = surrogate.hop_scores(choices)
    assert cost.shape[1] == 1 + max(block.hops for block in space.graph.blocks)
    assert (cost >= 0).all()
    assert cost.sum(axis=1) * surrogate.units()[0] == pytest.approx(total[0])


# ------------------------------------------------------------------------------------------------------- attribution


def test_attribution_survives_a_round_trip(explained, tmp_path):
    found = explained["additive"]
    found.save(tmp_path / "attribution.json")
    again = Attribution.load(tmp_path / "attribution.json")
    assert again.to_dict() == found.to_dict()
    assert (again.values == found.values).all()


@pytest.mark.parametrize("name", KINDS)
def test_attribution_has_one_shape_for_all(explained, space, name):
    found = explained[name]
    assert found.source == name
    assert found.values.shape == found.spread.shape == space.bits.shape
    assert np.abs(found.values.mean(axis=1)).max() < 1e-9
    assert found.spread.max() > 0
    assert set(found.by_method) == {"uniform-channel", "kmeans-channel", "kmeans-tensor"}
    assert set(found.by_block) == {block.name for block in space.graph.blocks}
    by_block = sum(np.array(list(row.values())) for row in found.by_block.values())
    assert by_block == pytest.approx(found.values.sum(axis=0))
    assert all(row["4"] > row["2"] for row in found.by_method.values())  # more bits are worth more


# ------------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("name", KINDS)
def test_same_seed_same_surrogate_and_the_global_generator_is_untouched(space, trials, name):
    choices, y = trials[0][:60], trials[1][:60]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = (quick(name, space).fit(choices, y).predict(choices) for _ in range(2))
    assert (first == second).all()
    assert (torch.get_rng_state() == before).all()
    assert (quick(name, space, random_state=1).fit(choices, y).cv_scores_) != quick(name, space).fit(
        choices, y
    ).cv_scores_


@pytest.mark.parametrize("name", KINDS)
def test_surrogate_survives_a_round_trip_and_refuses_another_space(fitted, space, held_out, name, tmp_path):
    fitted[name].save(tmp_path / "surrogate")
    again = KINDS[name].load(tmp_path / "surrogate", space)
    assert (again.predict(held_out[0]) == fitted[name].predict(held_out[0])).all()
    assert again.cv_scores_ == fitted[name].cv_scores_
    assert again.cv_ndcg_ == fitted[name].cv_ndcg_
    assert (again.fold_values() == fitted[name].fold_values()).all()
    other = planted_space(tuple(Scheme(method="uniform", bits=bits) for bits in (2, 3)))
    with pytest.raises(QuantDMError, match="another model or other options"):
        KINDS[name].load(tmp_path / "surrogate", other)


@pytest.mark.parametrize("name", KINDS)
def test_trials_with_less_weight_count_less(space, trials, name):
    choices, y = trials[0][:60], trials[1][:60]
    spoilt = y.copy()
    spoilt[::4] += 3.0
    weight = np.where(np.arange(60) % 4 == 0, 1e-3, 1.0)
    clean = np.arange(60) % 4 != 0
    heard = KINDS[name](space).fit(choices, spoilt).predict(choices)[clean]
    unheard = KINDS[name](space).fit(choices, spoilt, weight).predict(choices)[clean]
    assert np.abs(unheard - y[clean]).mean() < np.abs(heard - y[clean]).mean()


@pytest.mark.parametrize("name", KINDS)
def test_bad_trials_are_one_clear_error(space, trials, name):
    choices, y = trials[0][:60], trials[1][:60]
    surrogate = quick(name, space)
    with pytest.raises(QuantDMError, match="not fitted"):
        surrogate.predict(choices)
    with pytest.raises(QuantDMError, match="not fitted"):
        attribute(surrogate)
    with pytest.raises(QuantDMError, match="not fitted"):
        surrogate.save("nowhere")
    with pytest.raises(QuantDMError, match=r"got 8 trials, expected at least \d+"):
        surrogate.fit(choices[:8], y[:8])
    with pytest.raises(QuantDMError, match="nothing to learn"):
        surrogate.fit(choices, np.ones(60))
    with pytest.raises(QuantDMError, match=r"1 labels are NaN or infinite .first: trial 7"):
        surrogate.fit(choices, np.where(np.arange(60) == 7, np.nan, y))
    with pytest.raises(QuantDMError, match="expected one label for each of the 60 trials"):
        surrogate.fit(choices, y[:-1])
    with pytest.raises(QuantDMError, match="belong to another model"):
        surrogate.fit(choices[:, :-1], y)
    with pytest.raises(QuantDMError, match="60 positive numbers"):
        surrogate.fit(choices, y, -np.ones(60))
