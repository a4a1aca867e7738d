"""What runs of other denoisers teach: planted effects of roles travel, and a new run starts from them."""

import zlib

import numpy as np
import pytest

from quantdm import QuantDMError, Scheme
from quantdm.allocation.sampling import sample_configs, sample_frontier
from quantdm.files import read_json
from quantdm.pipelines.subject import look_at
from quantdm.runs.learned import learn_from
from quantdm.runs.run import Run
from quantdm.runs.search import start_run
from quantdm.runs.stages import LEARNED_FILE, learned_values, load_space
from quantdm.runs.trials import first_trials
from quantdm.surrogates.ranking import spearman
from quantdm.surrogates.roles import role_of
from quantdm.surrogates.transfer import learn, share, values_by
from tests.planted import planted_space
from tests.report_run import make_run, make_space
from tests.tiny_search import EFFORT, OPTIONS, TRIALS


def effect_of(name):
    """A factor that every denoiser has alike."""
    return np.exp(0.8 * np.random.default_rng(zlib.crc32(name.encode())).normal())


def truth(space, choices):
    """Labels y of choices where roles and methods err by factors that all denoisers share."""
    by_role = np.array([[effect_of(role_of(layer))] for layer in space.layers])
    by_method = np.array([effect_of(option.label.replace(f"-{option.bits}", "")) for option in space.options])
    terms = space.noise_error * by_role * by_method
    return -np.log(0.02 + 0.1 * space.gather(terms, choices).sum(axis=1) / np.median(terms.sum(axis=0)))


def donor_of(model):
    space = planted_space(model=model)
    choices = sample_configs(space, 150, seed=0)
    return learn(space, choices, truth(space, choices))


@pytest.fixture(scope="module")
def donor():
    return donor_of("digits-dit")


def test_shared_effects_rank_a_new_denoiser_without_any_trial(donor):
    space = planted_space(model="pixart-xl-2")
    near = sample_frontier(space, -space.noise_error, 100, target_bits=3.0, seed=1)
    told = share([donor])
    values = values_by(space, dict(zip(told.names, told.mean, strict=True)))
    learned, plain = (
        spearman(space.gather(table, near).sum(axis=1), truth(space, near)) for table in (values, -space.noise_error)
    )
    assert 1 - learned <= 0.75 * (1 - plain)
    assert values.shape == space.bits.shape
    assert (values < 0).all()


def test_nothing_learned_is_the_sum_of_noise_errors(donor):
    space = planted_space()
    assert share([]).names == ()
    ratio = values_by(space, {}) / -space.noise_error
    assert ratio == pytest.approx(np.full_like(ratio, ratio[0, 0]))
    strange = dict.fromkeys(["role of another world", "option uniform-channel-7"], 5.0)
    assert np.array_equal(values_by(space, strange), values_by(space, {}))


def test_a_second_donor_makes_surer_and_a_tighter_bond_says_more(donor):
    one, two = share([donor]), share([donor, donor])
    assert (np.diag(two.covariance) <= np.diag(one.covariance) + 1e-12).all()
    assert np.diag(two.covariance).sum() < np.diag(one.covariance).sum()
    tight, loose = (np.abs(share([donor], rho=rho).mean).sum() for rho in (0.1, 0.9))
    assert loose < tight


def test_a_run_starts_from_what_others_taught_and_keeps_it(finished, dit, tmp_path):
    asked = {"target_bits": 3.2, "trials": TRIALS, "options": OPTIONS, "effort": EFFORT}
    subject = look_at(dit)
    run, _ = start_run(subject, tmp_path / "run", **asked, learned_from=[finished[0]])
    record = read_json(run.path(LEARNED_FILE))
    assert run.settings.learned == record["digest"]
    assert record["sources"][0]["trials"] == TRIALS
    again, _ = start_run(subject, tmp_path / "run", **asked)  # without the option a run keeps what it learned
    assert again.settings == run.settings
    plain, _ = start_run(subject, tmp_path / "plain", **asked)
    assert "learned" not in plain.settings.model_dump(mode="json")
    space = load_space(Run.open(finished[0]))
    assert learned_values(plain, space) is None
    values = learned_values(run, space)
    assert values is not None
    first, usual = (
        first_trials(space, TRIALS, targets=[3.2], seed=0, values=table) for table in (values, -space.noise_error)
    )
    assert len(first) == len(usual)
    assert (first != usual).any()


def test_what_cannot_teach_is_one_clear_error(finished, tmp_path):
    few = make_run(tmp_path / "few", make_space())
    for folder, options, expected in (
        (tmp_path / "nowhere", OPTIONS, "no run in"),
        (few, make_space().options, "has 24 trials, expected 30 or more"),
        (finished[0], (Scheme.parse("kmeans-channel-8"),), "measured other options"),
    ):
        with pytest.raises(QuantDMError, match=expected):
            learn_from([folder], options)
