"""Cheap labels: they stand for full ones where they rank alike, are dropped where they do not, and it is said."""

import shutil

import numpy as np
import pytest

from quantdm.errors import QuantDMError
from quantdm.files import read_json
from quantdm.pipelines.subject import look_at
from quantdm.runs.cheap import told
from quantdm.runs.engines.call import called
from quantdm.runs.evaluator import Evaluator, job_of
from quantdm.runs.labelled import label_draw
from quantdm.runs.proposals import answer
from quantdm.runs.run import MIN_TRIALS, Run
from quantdm.runs.settings import make_settings
from quantdm.runs.stages import load_space
from quantdm.runs.trials import cheap_verdict, load_labels, load_trials, run_trials
from quantdm.schemes import ORIGINAL, QuantConfig
from quantdm.surrogates import SearchSpace
from tests.tiny_search import EFFORT, OPTIONS, TRIALS

MANY = 80


class Planted:
    """An engine whose full label is the sum of one-layer errors, and whose cheap one is a power of it."""

    def __init__(self, space, power):
        self.space, self.power, self.asked = space, power, []

    def map(self, method, arguments, *, at_most=None, until=None):
        for index, argument in enumerate(arguments):
            call = called(method, argument)
            self.asked.append(call.method)
            if call.method == "propose":
                yield index, answer(call.argument, self.space)
            elif call.method != "prepare":
                choice = self.space.choice_of(QuantConfig.from_labels(call.argument.labels))
                error = float(self.space.gather(self.space.noise_error, choice[None]).sum())
                figures = {"fid_fp": error**2} if call.method == "measure" else {"noise_error": error**self.power}
                yield index, figures


@pytest.fixture
def planted(finished, tmp_path):
    """A run of many trials in automatic fidelity, without any trial yet, and its space."""
    opened = Run.open(finished[0])
    shutil.copy(opened.path("space.json"), tmp_path / "space.json")
    run = Run(tmp_path, opened.settings.model_copy(update={"trials": MANY, "fidelity": "auto"}))
    return run, load_space(run)


def test_cheap_labels_that_rank_alike_stand_for_full_ones_and_train_the_same_surrogates(planted):
    run, space = planted
    engine = Planted(space, 0.5)
    choices, y = run_trials(run, engine, space, proposers=("additive",))
    found = cheap_verdict(run)
    assert found is not None
    assert found["kept"]
    assert found["rank_correlation"] == pytest.approx(1)
    assert found["trials"] + len(y) < MANY
    assert engine.asked.count("measure") == len(y) == len(load_trials(run, space)[0]) == MIN_TRIALS
    assert "stands for the full label of" in told(found)
    everything, labels, _ = load_labels(run, space)
    assert len(everything) == found["trials"] + len(y)
    errors = space.gather(space.noise_error, everything).sum(axis=1)
    assert labels == pytest.approx(-2 * np.log(errors), abs=1e-6)  # a line makes one unit of both
    again = Planted(space, 0.5)
    assert np.array_equal(run_trials(run, again, space, proposers=("additive",))[0], choices)
    assert not again.asked


def test_layers_that_stay_as_they_are_have_cheap_labels_and_rounds_like_all_others(planted):
    run, space = planted
    nothing = np.zeros(len(space.layers))
    tables = (16 * space.num_weights, nothing, nothing)
    known = (space.bits, space.weight_error, space.noise_error)
    wider = SearchSpace(
        space.layers, space.graph, (*space.options, ORIGINAL),
        *(np.column_stack([table, column]) for table, column in zip(known, tables, strict=True)),
    )  # fmt: skip
    run = Run(run.folder, run.settings.model_copy(update={"options": wider.labels}))
    _, y = run_trials(run, Planted(wider, 0.5), wider, proposers=("additive",))
    found = cheap_verdict(run)
    assert found is not None
    assert found["kept"]
    everything, labels, _ = load_labels(run, wider)
    assert len(everything) == found["trials"] + len(y)
    assert (everything == len(space.options)).any()
    errors = wider.gather(wider.noise_error, everything).sum(axis=1)
    assert labels == pytest.approx(-2 * np.log(errors), abs=1e-6)


def test_cheap_labels_that_rank_otherwise_are_dropped_and_everything_is_measured_in_full(planted):
    run, space = planted
    engine = Planted(space, -1.0)
    choices, _ = run_trials(run, engine, space, proposers=("additive",))
    found = cheap_verdict(run)
    assert found is not None
    assert not found["kept"]
    assert len(choices) == engine.asked.count("measure") == MANY
    assert told(found).endswith("dropped")
    assert np.array_equal(load_labels(run, space)[1], load_trials(run, space)[1])
    full = Run(run.folder.parent / "full", run.settings.model_copy(update={"fidelity": "full"}))
    shutil.copytree(run.folder, full.folder, ignore=shutil.ignore_patterns("trials*", "cheap", "proposals"))
    assert np.array_equal(run_trials(full, Planted(space, 1.0), space, proposers=("additive",))[0], choices)
    assert "cheap" not in read_json(full.path("trials.json"))


def test_a_run_with_cheap_labels_grows_and_keeps_what_they_say(planted):
    run, space = planted
    choices, y = run_trials(run, Planted(space, 0.5), space, proposers=("additive",))
    before, engine = cheap_verdict(run), Planted(space, 0.5)
    assert before is not None
    grown = Run(run.folder, run.settings.model_copy(update={"trials": 3 * MANY}))
    more, _ = run_trials(grown, engine, space, proposers=("additive",))
    assert np.array_equal(more[: len(choices)], choices)
    assert engine.asked.count("measure") == len(more) - len(y) > 0
    assert cheap_verdict(grown) == before
    assert load_labels(grown, space)[2] == before["trials"]


def test_a_run_of_full_labels_goes_on_with_cheap_ones(planted):
    run, space = planted
    full = Run(run.folder, run.settings.model_copy(update={"fidelity": "full"}))
    choices, _ = run_trials(full, Planted(space, 0.5), space, proposers=("additive",))
    grown = Run(run.folder, run.settings.model_copy(update={"trials": 2 * MANY}))
    more, _ = run_trials(grown, Planted(space, 0.5), space, proposers=("additive",))
    assert np.array_equal(more[: len(choices)], choices)
    assert len(more) == 2 * MANY


def test_few_pairs_of_labels_decide_nothing(planted):
    run, space = planted
    few = Run(run.folder, run.settings.model_copy(update={"trials": TRIALS}))
    _, y = run_trials(few, Planted(space, 0.5), space, proposers=("additive",))
    found = cheap_verdict(few)
    assert found is not None
    assert not found["kept"]
    assert len(y) == TRIALS


def test_a_first_estimate_of_the_time_is_corrected_by_what_was_measured(planted):
    run, space = planted
    full = Run(run.folder, run.settings.model_copy(update={"fidelity": "full"}))
    whole, _ = run_trials(full, Planted(space, 1.0), space, proposers=("additive",))
    slow = Run(run.folder.parent / "slow", full.settings)
    shutil.copytree(run.folder, slow.folder, ignore=shutil.ignore_patterns("trials*", "cheap", "proposals"))
    found, _ = run_trials(
        slow, Planted(space, 1.0), space, proposers=("additive",), most=lambda done: 10 * MANY if done else MANY // 4
    )
    assert np.array_equal(found, whole)


def test_time_that_ends_cheap_labels_early_leaves_a_run_that_goes_on(planted):
    run, space = planted
    engine = Planted(space, 0.5)
    run_trials(run, engine, space, proposers=("additive",), most=lambda done: 36)
    assert engine.asked.count("measure") <= 36
    assert read_json(run.path("trials.json"))["inputs"] == "cut short"


def test_the_cheap_label_is_the_error_of_the_output_and_nothing_quantized_has_none(finished, dit):
    run = Run.open(finished[0])
    evaluator, space = Evaluator(run, look_at(dit)), load_space(run)
    errors = []
    for option in (OPTIONS[0].label, OPTIONS[-1].label, None):
        job = job_of(run, label_draw(run), dict.fromkeys(space.layer_names, option))
        errors.append(evaluator.noise_error(job)["noise_error"])
    assert errors[0] > 2 * errors[1] > 0
    assert errors[2] < 1e-3 * errors[1]


def test_an_unknown_fidelity_is_one_clear_error(dit):
    with pytest.raises(QuantDMError, match="fidelity: got 'cheap'"):
        make_settings(
            look_at(dit), target_bits=3.2, target_bytes=None, trials=TRIALS, seed=0, options=OPTIONS, effort=EFFORT,
            fidelity="cheap",
        )  # fmt: skip
