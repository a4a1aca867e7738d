"""A stage whose record exists for the same inputs is not run again, and a recipe is measured as it stands."""

import json
import shutil

import numpy as np
import pytest
import yaml

from quantdm import QuantDMError, Recipe, get_denoiser, load_pipeline, load_recipe
from quantdm.activations import usual_activations
from quantdm.allocation.candidates import BASELINE, LEAST_WEIGHT_ERROR, baseline_choices, mean_of_standardised
from quantdm.correction import load_correction
from quantdm.files import read_json, tensors_digest
from quantdm.pipelines.subject import look_at
from quantdm.runs import choose as choosing
from quantdm.runs import explain as explaining
from quantdm.runs import final, why
from quantdm.runs import trials as trying
from quantdm.runs.correct import correct_run
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import Evaluator, Job
from quantdm.runs.run import Run
from quantdm.runs.trials import load_trials
from quantdm.schemes import Scheme
from quantdm.surrogates import AdditiveSurrogate, GraphSurrogate, RidgeSurrogate, SearchSpace, TreeSurrogate
from tests.tiny_search import run_search

RECORDS = ("trials.json", "surrogate.json", "attribution.json", "selection.json", "recipe.yaml")
KINDS = (AdditiveSurrogate, TreeSurrogate, GraphSurrogate, RidgeSurrogate)


class CalledError(Exception):
    """Says that a stage went to work."""


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished tiny run."""
    return Run.open(shutil.copytree(finished[0], tmp_path / "run"))


@pytest.fixture
def space(run):
    return SearchSpace.load(run.path("space.json"))


@pytest.fixture
def alarmed(monkeypatch):
    """Every piece of work of the last stages raises CalledError with its name."""

    def alarm(name):
        def work(*_, **__):
            raise CalledError(name)

        return work

    for kind in KINDS:
        monkeypatch.setattr(kind, "fit", alarm("fit"))
    monkeypatch.setattr(explaining, "attribute", alarm("attribute"))
    for name in ("score_blocks", "select", "select_lambda", "race"):
        monkeypatch.setattr(choosing, name, alarm("choose"))
    monkeypatch.setattr(why, "explain_one", alarm("why"))
    for name in ("first_trials", "work_through"):
        monkeypatch.setattr(trying, name, alarm("trials"))


def times_of(run):
    return {name: run.path(name).stat().st_mtime_ns for name in RECORDS}


def test_a_searched_recipe_names_the_weights_that_it_was_found_on(run, finished):
    weights = load_recipe(run.path("recipe.yaml")).provenance.weights
    assert weights
    assert weights == run.settings.seen.weights


def test_no_stage_of_a_finished_search_is_run_again(run, finished, alarmed):
    before = times_of(run)
    assert run_search(run.folder, workers=1) == finished[1]
    assert times_of(run) == before


@pytest.mark.parametrize(("lost", "called"), [
    ("trials.json", "trials"), ("surrogate.json", "fit"), ("surrogates/tree.json", "fit"),
    ("attribution.json", "attribute"), ("selection.json", "choose"), ("why.json", "why"),
])  # fmt: skip
def test_a_stage_whose_record_is_gone_is_run_again_and_no_earlier_one(run, alarmed, lost, called):
    run.path(lost).unlink()
    with pytest.raises(CalledError) as caught:
        run_search(run.folder, workers=1)
    assert str(caught.value) == called


def test_another_label_makes_the_surrogates_be_fitted_again(run, space, alarmed):
    trial = next(run.path("trials").glob("*.json"))
    record = json.loads(trial.read_text())
    explaining.fit_surrogates(run, space, *load_trials(run, space))
    trial.write_text(json.dumps(record | {"fid_fp": 2 * record["fid_fp"]}))
    with pytest.raises(CalledError, match="fit"):
        explaining.fit_surrogates(run, space, *load_trials(run, space))


def test_reopened_surrogates_explain_and_choose_as_the_fitted_ones(run, space, finished, dit):
    fitted = explaining.fit_surrogates(run, space, *load_trials(run, space))
    before = read_json(run.path("attribution.json"))
    run.path("attribution.json").unlink()
    attributions = explaining.explain(run, fitted)
    assert read_json(run.path("attribution.json")) == before
    selection = read_json(run.path("selection.json"))
    run.path("selection.json").unlink()
    with Engine(run, look_at(dit), workers=1) as engine:  # it measures nothing: the candidates were verified
        assert choosing.choose(run, engine, space, attributions, fitted["graph"]) == finished[1]
    assert read_json(run.path("selection.json")) == selection


def test_a_recipe_that_was_changed_by_hand_stays_and_claims_no_figures(run, space, finished):
    recipe = finished[1]
    name = next(iter(recipe.layers))
    other = "uniform-channel-2" if recipe.layers[name] != "uniform-channel-2" else "kmeans-channel-4"
    edited = recipe.model_copy(update={"layers": {**recipe.layers, name: other}})
    run.path("recipe.yaml").write_text(edited.to_yaml())
    again = run_search(run.folder, workers=1)
    assert again.layers[name] == load_recipe(run.path("recipe.yaml")).layers[name] == other
    assert again.provenance.measured == {}
    assert "changed by hand" in again.provenance.source
    assert again.avg_bits == pytest.approx(float(space.avg_bits(space.choice_of(again.config))[0]), abs=1e-6)


# ------------------------------------------------------------------------------------------------- a recipe by patterns


def by_hand(run, record):
    """Write a recipe as a user does and read it."""
    run.path("recipe.yaml").write_text(yaml.safe_dump({"version": 1, "model": "digits-dit", **record}))
    return load_recipe(run.path("recipe.yaml"))


def test_a_recipe_of_patterns_is_corrected_as_the_weights_that_it_means(run, space, dit):
    recipe = by_hand(run, {"default": "uniform-channel-4", "patterns": {"*.attn1.*": "uniform-channel-2"}})
    assert recipe.layers == {}  # that is what was measured before: nothing quantized
    with Engine(run, look_at(dit), workers=1) as engine:
        path = correct_run(run, engine, recipe, usual_activations(get_denoiser(dit), 6), images=8)
        worse = load_correction(path).measured["none"]
        before = path.stat().st_mtime_ns
        spec = usual_activations(get_denoiser(dit), 6)
        assert correct_run(run, engine, recipe.exact(space.layers), spec, images=8) == path
        assert path.stat().st_mtime_ns == before  # patterns and exact names say the same
        finer = by_hand(run, {"default": "kmeans-channel-4"})
        better = load_correction(correct_run(run, engine, finer, spec, images=8)).measured["none"]
    assert np.mean(worse) > 2 * np.mean(better) > 0


def test_a_comparison_of_corrections_that_was_interrupted_goes_on(run, dit, monkeypatch):
    recipe, spec = by_hand(run, {"default": "kmeans-channel-3"}), usual_activations(get_denoiser(dit), 6)
    store, measure, calls = run.path("corrected"), Evaluator.measure, []
    before = set(store.glob("*.json"))

    def interrupted(self, job):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(job)
        return measure(self, job)

    monkeypatch.setattr(Evaluator, "measure", interrupted)
    with Engine(run, look_at(dit), workers=1) as engine, pytest.raises(KeyboardInterrupt):
        correct_run(run, engine, recipe, spec, images=8)
    assert len(set(store.glob("*.json")) - before) == 5
    monkeypatch.setattr(Evaluator, "measure", lambda *a: calls.append(a[1]) or measure(*a))
    with Engine(run, look_at(dit), workers=1) as engine:
        first = load_correction(correct_run(run, engine, recipe, spec, images=8))
        measured = len(calls)
        assert len(set(store.glob("*.json")) - before) == measured > 5  # each once
        again = load_correction(correct_run(run, engine, recipe, spec, images=8, anew=True))
    assert len(calls) == measured  # the same statistics: nothing is measured anew
    assert again.measured == first.measured
    assert all(file.stem == tensors_digest(file) for file in store.glob("*.safetensors"))


def test_the_rows_of_a_recipe_of_patterns_are_of_the_weights_that_it_means(run, space, finished):
    keep = space.layer_names[0]
    recipe = by_hand(run, {"default": "kmeans-channel-4", "layers": {keep: "original"}})
    spec = usual_activations(get_denoiser(load_pipeline("digits-dit")), 6)
    jobs = final.final_jobs(run, space, recipe, spec, "correction.safetensors")
    labels = {name: None if name == keep else "kmeans-channel-4" for name in space.layer_names}
    for name in ("recipe", "recipe+a6", "recipe+a6+correction"):
        assert jobs[name][0].labels == labels
    assert jobs["recipe"][1] == "changed by hand"
    column = space.bits[:, space.labels.index("kmeans-channel-4")]
    assert final.row_bits(space, jobs["recipe"][0]) == 16 * space.num_weights[0] + column[1:].sum()
    assert final.final_jobs(run, space, finished[1], spec, None)["recipe"][1] != "changed by hand"


def test_a_recipe_that_quantizes_further_parts_is_refused_where_only_the_denoiser_is_measured(run, space, dit):
    recipe = by_hand(run, {"default": "kmeans-channel-4", "components": {"vae": {"default": "uniform-channel-8"}}})
    spec = usual_activations(get_denoiser(dit), 6)
    with (
        Engine(run, look_at(dit), workers=1) as engine,
        pytest.raises(QuantDMError, match=r"quantizes vae.*take its components"),
    ):
        correct_run(run, engine, recipe, spec, images=8)
    with pytest.raises(QuantDMError, match="also quantizes vae"):
        final.final_jobs(run, space, recipe, spec, None)


def test_a_recipe_of_other_layers_is_refused(run, space, dit):
    recipe = Recipe(model="digits-dit", layers=dict.fromkeys(space.layer_names[1:], "kmeans-channel-4"))
    spec = usual_activations(get_denoiser(dit), 6)
    with Engine(run, look_at(dit), workers=1) as engine, pytest.raises(QuantDMError, match="no scheme for 1 layer of"):
        correct_run(run, engine, recipe, spec, images=8)


# ------------------------------------------------------------------------------------------------- rows and their names


def test_the_uniform_row_is_uniform_even_where_a_mix_is_better(run, space, finished):
    record = read_json(run.path("selection.json"))
    record["candidates"][LEAST_WEIGHT_ERROR]["fid_fp_mean"] = 0.0  # the best of all that need no search
    run.path("selection.json").write_text(json.dumps(record))
    spec = usual_activations(get_denoiser(load_pipeline("digits-dit")), 6)
    jobs = final.final_jobs(run, space, finished[1], spec, None)
    uniform, note = jobs["uniform-next-width"]
    assert set(uniform.labels.values()) == {note}
    assert final.row_bits(space, uniform) >= 3.2 * space.num_weights.sum()
    mix, _ = jobs["least-weight-error"]
    assert len(set(mix.labels.values())) > 1
    assert final.row_bits(space, mix) <= 3.2 * space.num_weights.sum()
    assert mix.labels == record["configs"][LEAST_WEIGHT_ERROR]


def test_baselines_are_the_next_width_of_every_method_and_there_is_always_one(space):
    found = baseline_choices(space, 3.2)
    assert set(found) == {
        LEAST_WEIGHT_ERROR,
        *(f"{BASELINE}{label}" for label in ("kmeans-channel-3", "uniform-channel-4")),
    }
    widest = max(float(space.avg_bits(np.full(len(space.layers), o))[0]) for o in range(len(space.options)))
    (only,) = [name for name in baseline_choices(space, widest + 1e-6) if name != LEAST_WEIGHT_ERROR]
    scheme = Scheme.parse(only.removeprefix(BASELINE))
    assert final.row_bits(space, Job(final.Draw(0, 0, 0), dict.fromkeys(space.layer_names, scheme.label))) == round(
        widest * space.num_weights.sum()
    )


def test_pooled_values_weigh_every_explanation_alike_and_are_no_ranks():
    table = np.array([[0.0, 1.0, 5.0], [2.0, 2.0, 8.0]])
    for scale in (1e-3, 1e3):
        assert np.allclose(mean_of_standardised([table, scale * table]), mean_of_standardised([table]))
    pooled = mean_of_standardised([table])
    assert pooled.std() == pytest.approx(1)
    assert np.allclose(pooled.mean(axis=1), 0)
    assert pooled[0, 2] - pooled[0, 1] == pytest.approx(
        4 * (pooled[0, 1] - pooled[0, 0])
    )  # distances, which ranks lose


def test_sampling_noise_of_few_draws_has_no_spread(run, dit):
    with Engine(run, look_at(dit), workers=1) as engine:
        draws = [final.Draw(base, 4, 2) for base in (70, 71, 72)]
        three, two, one = (final.sampling_noise(engine, draws[:n]) for n in (3, 2, 1))
    assert three["sd"] > 0
    assert two["mean"] > 0
    assert two["sd"] is None
    assert one == {"mean": None, "sd": None}
