"""The study of measured swaps and restored layers: its judgements, on planted truth."""

import numpy as np
import pytest

from eval.restore_truth import (
    SHARES,
    draw_swaps,
    ends_of,
    judge_blocks,
    judge_curves,
    judge_swaps,
    plan_blocks,
    plan_curves,
    restored,
)
from quantdm.allocation import select
from quantdm.surrogates import AdditiveSurrogate
from tests.planted import MeetingTruth, PlantedTruth, planted_space


@pytest.fixture(scope="module")
def space():
    return planted_space()


def test_layers_are_restored_in_order_within_the_share_of_bytes(space):
    low, high = ends_of(space)
    assert space.options[high].bits == space.options[low].bits + 2
    assert space.options[high].method == space.options[low].method
    x, reference = (np.full(len(space.layers), option) for option in (low, high))
    extra = (space.bits[:, high] - space.bits[:, low]).astype(float)
    order, before = np.argsort(extra), x
    for share in SHARES:
        found = restored(x, reference, order, extra, share)
        assert extra[found == high].sum() <= share * extra.sum()
        assert (found[before == high] == high).all()  # smallest first: more bytes only add
        before = found
    assert (restored(x, reference, order, extra, 1.0) == reference).all()


def test_swaps_are_judged_over_the_ceiling_of_two_noisy_draws(space):
    truth, rng = PlantedTruth(space), np.random.default_rng(0)
    fitted = {"additive": AdditiveSurrogate(space).fit(*truth.trials(150))}
    reference = select(space, -space.noise_error, target_bits=3.0)
    rows = draw_swaps(space, reference, 120)
    assert len(np.unique(rows, axis=0)) == 120
    assert ((rows != reference).sum(axis=1) == 1).all()
    types = np.array([layer.op_type for layer in space.layers])
    assert {types[i] for i in np.flatnonzero(rows != reference) % len(types)} == set(types)
    plan = {"rows": np.concatenate([reference[None], rows])}
    noisy = truth.y(plan["rows"]) + 0.014 * rng.normal(size=(2, 121))
    found = judge_swaps(space, fitted, plan, noisy, noisy)
    assert found["label_sd"] == pytest.approx(0.014, rel=0.2)
    assert 0.3 < found["agreement_of_draws"] < 1
    one = found["agreement"]["additive"]
    assert one["interval"][0] < one["spearman"] < one["interval"][1]
    assert one["spearman"] < one["over_ceiling"] <= 1.1
    assert one["large"] > one["small"]


def test_restore_curves_are_judged_by_paired_intervals(space):
    truth, rng = MeetingTruth(space, "none"), np.random.default_rng(0)
    fitted = {"additive": AdditiveSurrogate(space).fit(*truth.trials(150))}
    plan = plan_curves(space, fitted, 0)
    shared, own = rng.normal(size=(2, 1, 300)), 0.1 * rng.normal(size=(2, len(plan["rows"]), 300))
    found = judge_curves(space, fitted, plan, np.tile(truth.y(plan["rows"]), (2, 1)), shared + own)
    ahead = found["area_ahead_of"]["additive"]
    for rival in ("noise errors", "weight errors", "bits", "chance"):
        low, high = ahead[rival]["interval"]
        assert low < ahead[rival]["by"] < high
        assert high - low < 0.05  # what the images share cancels: unpaired it is ten times as wide
    assert ahead["chance"]["interval"][0] > 0
    assert found["undone"]["additive"] == sorted(found["undone"]["additive"])  # more bytes restore more


def test_interactions_of_blocks_are_seen_where_errors_add_coherently(space):
    shares = {}
    for kind in ("none", "coherent"):
        truth = MeetingTruth(space, kind)
        fitted = {"additive": AdditiveSurrogate(space).fit(*truth.trials(150))}
        plan = plan_blocks(space, fitted, 0)
        found = judge_blocks(space, fitted, plan, np.tile(truth.y(plan["rows"]), (2, 1)), np.zeros(0))
        shares[kind] = found["share_of_interaction_measured"]
        assert found["agreement_of_draws"] == pytest.approx(1)
        assert found["surrogates"]["additive"]["blocks_spearman"] > 0.8
    assert shares["none"] < 0.1 < shares["coherent"]
