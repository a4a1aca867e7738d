"""The study of measured swaps and restored layers: its judgements, on planted truth."""

import numpy as np
import pytest

from eval.restore_study import SHARES, draw_swaps, ends_of, judge_swaps, restored
from quantdm.allocation import select
from quantdm.surrogates import AdditiveSurrogate
from tests.planted import PlantedTruth, planted_space


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
    exact = truth.y(rows) - truth.y(reference)
    noisy = exact + 0.02 * rng.normal(size=(2, 120))
    found = judge_swaps(space, fitted, reference, rows, noisy)
    assert found["label_sd"] == pytest.approx(0.02, rel=0.2)
    assert 0.3 < found["agreement_of_draws"] < 1
    one = found["agreement"]["additive"]
    assert one["interval"][0] < one["spearman"] < one["interval"][1]
    assert one["spearman"] < one["over_ceiling"] <= 1.1
    assert one["large"] > one["small"]
