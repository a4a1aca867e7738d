"""Pruning: what replaces an option has no more bits and errs no more, and nothing replaces that."""

import numpy as np
import pytest

from quantdm.allocation import select
from quantdm.allocation.pruning import dominated, prune, replacements
from quantdm.allocation.sampling import sample_configs
from quantdm.runs.trials import first_trials
from quantdm.schemes import DEFAULT_OPTIONS, ORIGINAL, PAPER_OPTIONS
from tests.planted import planted_space


@pytest.fixture(scope="module")
def space():
    return planted_space(PAPER_OPTIONS)


def test_a_replacement_costs_no_more_and_errs_no_more_and_stays(space):
    instead = replacements(space)
    rows = np.arange(len(space.layers))[:, None]
    assert (space.bits[rows, instead] <= space.bits).all()
    assert (space.noise_error[rows, instead] <= space.noise_error).all()
    assert (instead[rows, instead] == instead).all()
    assert (instead != np.arange(len(space.options))).any()  # else there was nothing to see


def test_what_is_left_is_the_pareto_front_of_the_layer(space):
    kept = replacements(space) == np.arange(len(space.options))
    for layer in range(len(space.layers)):
        bits, errors = space.bits[layer], space.noise_error[layer]
        for option in range(len(space.options)):
            no_worse = (bits <= bits[option]) & (errors <= errors[option])
            assert kept[layer, option] == (no_worse.sum() == 1)  # only itself; the planted errors have no ties


def test_pruned_choices_are_smaller_and_better_layer_by_layer(space):
    choices = sample_configs(space, 20, seed=1)
    pruned = prune(space, choices)
    assert (space.total_bits(pruned) <= space.total_bits(choices)).all()
    assert (space.gather(space.noise_error, pruned) <= space.gather(space.noise_error, choices)).all()


def test_barring_dominated_options_leaves_every_layer_some(space):
    barred = dominated(space)
    choice = select(space, -space.noise_error, target_bits=3.0, forbidden=barred)
    for name, option in zip(space.layer_names, choice, strict=True):
        assert space.labels[option] not in barred[name]


def test_no_trial_but_the_anchors_takes_a_dominated_option(space):
    choices = first_trials(space, 60, targets=[3.0], seed=0)
    mixes = choices[(choices != choices[:, :1]).any(axis=1)]
    assert len(mixes) > 20
    assert (prune(space, mixes) == mixes).all()


def test_the_default_options_are_calibrated_and_reach_beyond_four_bits():
    *quantizing, stays = DEFAULT_OPTIONS
    assert {option.calibration for option in quantizing} == {"feedback"}
    assert {option.bits for option in quantizing} == set(range(2, 9))
    assert stays == ORIGINAL
    assert len(quantizing) * 3 // 2 <= 30  # the fewest trials of a search
