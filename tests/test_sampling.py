"""Sampling: distinct, deterministic, extendable, spread over sizes, or gathered at the frontier."""

import numpy as np
import pytest

from quantdm.allocation.sampling import sample_configs, sample_frontier
from quantdm.allocation.select import select
from quantdm.errors import QuantDMError
from quantdm.schemes import Scheme
from tests.planted import PlantedTruth, planted_space


@pytest.fixture(scope="module")
def space():
    return planted_space()


def draw_random(space, count, seed=0):
    return sample_configs(space, count, seed=seed)


def draw_frontier(space, count, seed=0):
    return sample_frontier(space, -space.noise_error, count, target_bits=3.0, seed=seed)


@pytest.mark.parametrize("draw", [draw_random, draw_frontier], ids=["random", "frontier"])
class TestBothSamplers:
    def test_same_seed_same_configurations(self, space, draw):
        assert (draw(space, 40) == draw(space, 40)).all()
        assert (draw(space, 40) != draw(space, 40, seed=1)).any()

    def test_a_longer_list_starts_with_the_shorter_one(self, space, draw):
        assert (draw(space, 40)[:15] == draw(space, 15)).all()

    def test_configurations_are_distinct(self, space, draw):
        choices = draw(space, 120)
        assert choices.shape == (120, len(space.layers))
        assert len(np.unique(choices, axis=0)) == 120


def test_random_configurations_cover_all_sizes_evenly(space):
    sizes = space.avg_bits(sample_configs(space, 128, seed=0))
    counts, _ = np.histogram(sizes, bins=8, range=(sizes.min(), sizes.max()))
    assert sizes.min() < 2.3
    assert sizes.max() > 4.2
    assert counts.min() >= 8


def test_random_configurations_gather_at_a_target(space):
    sizes = space.avg_bits(sample_configs(space, 64, seed=0, target_bits=3.2))
    assert np.abs(sizes - 3.2).max() < 0.85
    assert abs(sizes.mean() - 3.2) < 0.1


def test_random_configurations_use_every_option_of_every_layer(space):
    choices = sample_configs(space, 256, seed=0)
    counts = (choices[:, :, None] == np.arange(len(space.options))).sum(axis=0)
    assert counts.min() >= 5


def test_half_of_the_random_configurations_mix_two_widths_only(space):
    bits = np.array([option.bits for option in space.options])
    widths = [len(np.unique(bits[choice])) for choice in sample_configs(space, 100, seed=0)]
    assert max(widths[::2]) == 2
    assert np.mean(np.array(widths[1::2]) == 3) > 0.6


def test_frontier_configurations_are_near_the_target_and_better_than_random_ones(space):
    truth = PlantedTruth(space)
    near = sample_frontier(space, -space.noise_error, 60, target_bits=3.0, spread=0.4, seed=0)
    sizes = space.avg_bits(near)
    assert ((sizes > 2.5) & (sizes <= 3.4)).all()
    random = sample_configs(space, 60, seed=0, target_bits=3.0)
    assert np.median(truth.y(near)) > np.quantile(truth.y(random), 0.9)


def test_frontier_without_noise_is_the_knapsack(space):
    (found,) = sample_frontier(space, -space.noise_error, 1, target_bits=3.0, spread=0.0, noise=0.0, seed=0)
    best = select(space, -space.noise_error, target_bits=3.0)
    loss = [space.gather(space.noise_error, choice).sum() for choice in (found, best)]
    assert loss[1] <= loss[0] <= 1.02 * loss[1]


def test_more_noise_means_more_different_configurations(space):
    best = select(space, -space.noise_error, target_bits=3.0)
    differing = [
        (sample_frontier(space, -space.noise_error, 20, target_bits=3.0, noise=noise, seed=0) != best).mean()
        for noise in (0.1, 0.7, 2.0)
    ]
    assert differing[0] < differing[1] < differing[2]


@pytest.mark.parametrize("end", ["low", "high"])
def test_a_frontier_at_the_end_of_what_is_reachable_holds_many_configurations(space, end):
    bits = {"low": space.bits.min(axis=1), "high": space.bits.max(axis=1)}[end]
    target = float(bits.sum() / space.num_weights.sum()) + {"low": 0.005, "high": -0.005}[end]
    near = sample_frontier(space, -space.noise_error, 24, target_bits=target, seed=0, allow_fewer=True)
    assert len(near) >= 20
    assert (np.abs(space.avg_bits(near) - target) < 0.5).all()


def test_a_target_above_the_mean_of_the_largest_width_is_sampled_too():
    """Codebooks of small layers weigh more than their codes: of one width, k-means reaches sizes that no mean does."""
    wide = planted_space(tuple(Scheme(method=m, bits=b) for m in ("uniform", "kmeans") for b in (3, 8)))
    most = float(wide.bits.max(axis=1).sum() / wide.num_weights.sum())
    widest = float(wide.bits[:, [1, 3]].mean(axis=1).sum() / wide.num_weights.sum())
    assert most - 0.75 > widest
    sizes = wide.avg_bits(sample_configs(wide, 40, seed=0, target_bits=most))
    assert sizes.max() <= most
    assert np.median(sizes) > widest - 1


def test_one_width_is_enough(space):
    options = tuple(Scheme(method=method, bits=4) for method in ("uniform", "kmeans"))
    assert sample_configs(planted_space(options), 10, seed=0).max() == 1


def test_bad_requests_are_one_clear_error(space):
    with pytest.raises(QuantDMError, match="expected 1 or more"):
        sample_configs(space, 0, seed=0)
    with pytest.raises(QuantDMError, match="what these options reach"):
        sample_configs(space, 4, seed=0, target_bits=7.0)
    with pytest.raises(QuantDMError, match="what these options reach"):
        sample_frontier(space, -space.noise_error, 4, target_bits=1.5, seed=0)
    with pytest.raises(QuantDMError, match="only 1 distinct"):
        sample_frontier(space, -space.noise_error, 4, target_bits=3.0, spread=0, noise=0, seed=0)
    only = planted_space((Scheme(method="uniform", bits=4),))
    with pytest.raises(QuantDMError, match="only 1 distinct"):
        sample_configs(only, 2, seed=0)
