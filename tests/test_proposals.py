"""Proposals: new, near the sizes asked for, and better than what needs no labels."""

import numpy as np
import pytest

from quantdm.allocation.sampling import sample_frontier
from quantdm.runs import proposals
from quantdm.runs.proposals import Proposal, answer, from_text, propose, to_text, weights_near
from quantdm.runs.trials import first_trials
from quantdm.surrogates import AdditiveSurrogate, TreeSurrogate
from tests.planted import PlantedTruth, planted_space

TARGETS = (2.6, 3.2)


@pytest.fixture(scope="module")
def learned():
    space = planted_space()
    truth = PlantedTruth(space)
    tried, y = truth.trials(120)
    surrogates = [kind(space).fit(tried, y) for kind in (AdditiveSurrogate, TreeSurrogate)]
    return space, truth, tried, surrogates, propose(space, surrogates, 41, targets=TARGETS, tried=tried, seed=5)


def test_proposals_are_new_and_shared_between_the_sizes(learned):
    space, _, tried, surrogates, found = learned
    assert len(found) == 41
    assert len(np.unique(np.concatenate([tried, found]), axis=0)) == 161
    assert np.array_equal(found, propose(space, surrogates, 41, targets=TARGETS, tried=tried, seed=5))
    near = [np.abs(space.avg_bits(found) - target) <= 0.26 for target in TARGETS]
    assert [int(rows.sum()) for rows in near] == [21, 20]


def test_proposals_beat_the_frontier_of_the_sensitivities(learned):
    space, truth, _, _, found = learned
    for target in TARGETS:
        rows = found[np.abs(space.avg_bits(found) - target) <= 0.26]
        plain = sample_frontier(space, -space.noise_error, 40, target_bits=target, spread=0.25, noise=0.4, seed=5)
        assert truth.y(rows).mean() > truth.y(plain).mean()


def test_a_round_weighs_trials_as_the_fit_behind_it_does(learned):
    space, truth, tried, _, _ = learned
    y = truth.y(tried)
    asked = Proposal(space.digest, tuple(to_text(tried)), tuple(y.tolist()), 20, TARGETS, ("additive",), 0, 5)
    weights = (weights_near(space, tried, *TARGETS), np.ones(len(tried)))
    fits = [AdditiveSurrogate(space).fit(tried, y, each) for each in weights]
    near, even = (propose(space, [fit], 20, targets=TARGETS, tried=tried, seed=5) for fit in fits)
    found = from_text(answer(asked, space)["choices"], len(space.layers))
    assert np.array_equal(found, near)
    assert not np.array_equal(found, even)


def test_an_answer_is_not_kept_for_another_rule(monkeypatch):
    asked = Proposal("space", ("00",), (1.0,), 20, TARGETS, ("additive",), 0, 5)
    before = asked.key
    monkeypatch.setattr(proposals, "RULE", (*proposals.RULE, "another"))
    assert asked.key != before


def test_first_trials_hold_every_option_alone_and_all_sizes():
    space = planted_space()
    choices = first_trials(space, 200, targets=TARGETS, seed=0)
    alone = [np.full(len(space.layers), option) for option in range(len(space.options))]
    assert all((choices == row).all(axis=1).any() for row in alone)
    frontier = space.avg_bits(choices[-60:])
    assert [int((np.abs(frontier - target) <= 0.41).sum()) for target in TARGETS] >= [30, 30]
