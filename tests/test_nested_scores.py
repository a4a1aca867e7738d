"""Held-out scores are nested: no label of a fold reaches what is judged on it, so noise scores nothing."""

import numpy as np
import pytest

from quantdm.surrogates import AdditiveSurrogate, GraphSurrogate, RidgeSurrogate, TreeSurrogate
from quantdm.surrogates.nested import choose_nested
from quantdm.surrogates.ranking import judge_folds, spearman
from quantdm.surrogates.trials import split_folds
from tests.planted import PlantedTruth, planted_space

KINDS = {
    "additive": lambda space, **settings: AdditiveSurrogate(space, **settings),
    "ridge": lambda space, **settings: RidgeSurrogate(space, **settings),
    "tree": lambda space, **settings: TreeSurrogate(space, rounds=20, **settings),
    "tree alone": lambda space, **settings: TreeSurrogate(space, rounds=20, prior=False, **settings),
    "graph": lambda space, **settings: GraphSurrogate(space, **settings),
}


@pytest.fixture(scope="module")
def space():
    return planted_space()


@pytest.fixture(scope="module")
def trials(space):
    return PlantedTruth(space).trials(60)


@pytest.mark.parametrize("name", KINDS)
def test_no_label_of_a_fold_reaches_what_is_judged_on_it(space, trials, name):
    choices, y = trials
    fitted = KINDS[name](space).fit(choices, y)
    assert fitted.held_out_ is not None
    folds = split_folds(60, 5, 0)
    for k in (0, 3):
        spoilt = y.copy()
        spoilt[folds[k]] = 10 * np.random.default_rng(k).normal(size=len(folds[k]))
        again = KINDS[name](space).fit(choices, spoilt)
        assert (again.held_out_[folds[k]] == fitted.held_out_[folds[k]]).all()
        assert (again.held_out_ != fitted.held_out_).any()  # the other folds did learn from them


@pytest.mark.parametrize("name", KINDS)
def test_the_scores_are_those_of_the_held_out_predictions(space, trials, name):
    choices, y = trials
    fitted = KINDS[name](space).fit(choices, y)
    assert (fitted.cv_scores_, fitted.cv_ndcg_) == judge_folds(fitted.held_out_, y, split_folds(60, 5, 0))
    # they are predictions in the unit of y, and not their ranks alone
    assert np.abs(fitted.held_out_ - y).mean() < np.abs(y - y.mean()).mean()


@pytest.mark.parametrize(("name", "seeds"), [("additive", 16), ("ridge", 100)])
def test_labels_of_noise_score_nothing(space, name, seeds):
    """Within a fold noise is exchangeable, so the mean is exactly 0 once nothing has seen the fold."""
    pool, _ = PlantedTruth(space).trials(200)
    rng = np.random.default_rng(1)
    scores = []
    for seed in range(seeds):
        choices = pool[rng.choice(len(pool), 40, replace=False)]
        fitted = KINDS[name](space, random_state=seed).fit(choices, rng.normal(size=40))
        scores.append(np.mean(fitted.cv_scores_))
    assert abs(np.mean(scores)) < 3 * np.std(scores) / np.sqrt(seeds)


def test_choosing_on_the_judged_folds_flatters_and_nesting_does_not():
    """Twenty guesses that know nothing: the best of them on the judged labels looks as if it knew something."""
    flat, nested, count, guesses = [], [], 40, 20
    for seed in range(100):
        rng = np.random.default_rng(seed)
        y, table = rng.normal(size=count), rng.normal(size=(guesses, count))
        folds = split_folds(count, 5, seed)
        found = choose_nested(
            lambda rows, strength: np.array([strength]),
            lambda rows, strengths: [np.array([strength]) for strength in strengths],
            lambda parameters, rows, table=table: table[int(parameters[0]), rows],
            range(guesses),
            y,
            np.ones(count),
            folds,
        )
        flat.append(np.mean([spearman(table[int(found.strength), fold], y[fold]) for fold in folds]))
        nested.append(np.mean(judge_folds(found.held_out, y, folds)[0]))
    error = np.std(nested) / 10
    assert np.mean(flat) > 10 * error
    assert abs(np.mean(nested)) < 3 * error


def test_every_fold_chooses_what_is_best_inside_its_training_trials():
    """Strength s predicts s: the fold's own choice is the best constant of the other folds."""
    rng = np.random.default_rng(0)
    folds, levels = split_folds(50, 5, 0), (0.0, 1.0, 2.0, 3.0)
    y = rng.integers(0, 4, size=50) + 0.1 * rng.normal(size=50)
    weights = rng.uniform(0.5, 2, size=50)
    found = choose_nested(
        lambda rows, strength: np.array([strength]),
        lambda rows, strengths: [np.array([strength]) for strength in strengths],
        lambda parameters, rows: np.full(len(rows), parameters[0]),
        levels,
        y,
        weights,
        folds,
    )
    for fold, strength in zip(folds, found.fold_strengths, strict=True):
        rest = np.setdiff1d(np.arange(50), fold)
        assert strength == min(levels, key=lambda level: (weights[rest] * (y[rest] - level) ** 2).sum())
        assert (found.held_out[fold] == strength).all()
    assert found.strength == min(levels, key=lambda level: (weights * (y - level) ** 2).sum())
