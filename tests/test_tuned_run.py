"""A tuned run: what is tuned is measured, exported and opened, and only if it belongs to the recipe."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from quantdm import QuantDMError, get_denoiser, load_pipeline, load_recipe
from quantdm.activations import usual_activations
from quantdm.corridor.export import export_run
from quantdm.files import read_json, tensors_digest, write_json
from quantdm.metrics.samples import Draw
from quantdm.pipelines.subject import look_at
from quantdm.quantizers import quantize_weight
from quantdm.runs import final
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import Job, configured
from quantdm.runs.run import Run
from quantdm.runs.stages import load_space
from quantdm.runs.tune import TUNING_FILE, tune_run, used_tuning
from quantdm.runs.tuned import TUNED_FILE, TunedWeights
from quantdm.schemes import Scheme
from quantdm.tuning import TuneSettings
from tests.random_weights import gaussian

SETTINGS = TuneSettings(steps=6, rows=8, every=3)


@pytest.fixture(scope="module")
def tuned(finished, tmp_path_factory):
    """A copy of the finished tiny run, tuned; it is said to help, whatever six steps did."""
    run = Run.open(shutil.copytree(finished[0], tmp_path_factory.mktemp("tuned") / "run"))
    pipe = load_pipeline("digits-dit")
    with Engine(run, look_at(pipe), workers=1) as engine:
        tune_run(run, engine, finished[1], SETTINGS, images=8)
        record = read_json(run.path(TUNING_FILE))
        write_json(run.path(TUNING_FILE), record | {"used": True})
        again = tune_run(run, engine, finished[1], SETTINGS, images=8)  # nothing is done twice
    assert again == run.path(TUNED_FILE)
    return run, record, pipe


def test_the_record_has_the_curve_and_the_figures_of_both(tuned):
    _, record, _ = tuned
    assert [step for step, _ in record["curve"]["transformer"]] == [0, 3, 6]
    assert set(record["figures"]) == {"untuned", "tuned"}
    assert all(row["mean"]["fid_fp"] > 0 for row in record["figures"].values())


def test_tuned_weights_are_saved_and_loaded_bit_by_bit(tmp_path):
    weight = quantize_weight(gaussian(12, 50), Scheme.parse("kmeans-channel-3"), split=20)
    kept = TunedWeights({"a.b": weight}, {"a.bias": torch.ones(12)})
    kept.save(tmp_path / "tuned.safetensors")
    again = TunedWeights.load(tmp_path / "tuned.safetensors")
    assert again.labels == {"a.b": "kmeans-channel-3"}
    assert torch.equal(again.get("a.b", weight.scheme).dequantize(), weight.dequantize())
    assert torch.equal(again.others["a.bias"], torch.ones(12))
    with pytest.raises(QuantDMError, match=r"tuned as kmeans-channel-3, expected uniform-channel-4"):
        again.get("a.b", Scheme.parse("uniform-channel-4"))
    with pytest.raises(QuantDMError, match=r"1 layers differ, first a\.b"):
        again.check({"a.b": "uniform-channel-4"})


def test_a_tuned_job_takes_the_tuned_weights_and_puts_the_old_ones_back(tuned, finished):
    run, _, pipe = tuned
    denoiser, weights = get_denoiser(pipe), TunedWeights.load(run.path(TUNED_FILE))
    before = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    labels = finished[1].resolve(load_space(run).layers).to_labels()
    job = Job(Draw(0, 1, 1), labels, tuned=str(run.path(TUNED_FILE)))
    with Engine(run, look_at(pipe), workers=1) as engine, configured(pipe, engine.local.bank, job, engine.local.tables):
        for name, weight in weights.weights.items():
            assert torch.equal(denoiser.get_parameter(f"{name}.weight"), weight.dequantize(dtype=torch.float32))
        for name, value in weights.others.items():
            assert torch.equal(denoiser.get_parameter(name), value)
    for name, p in denoiser.named_parameters():
        assert torch.equal(p, before[name])


def test_the_result_table_has_the_recipe_before_and_after(tuned, finished):
    run, _, pipe = tuned
    spec, path = usual_activations(get_denoiser(pipe), 6), str(run.path(TUNED_FILE))
    jobs = final.final_jobs(run, load_space(run), finished[1], spec, None, path)
    assert jobs["recipe-untuned"][0].tuned is None
    assert all(jobs[name][0].tuned == path for name in ("recipe", "recipe+a6"))
    assert "recipe+a6+correction" not in jobs
    assert final.run_key(run, jobs["recipe"][0]) != final.run_key(run, jobs["recipe-untuned"][0])


def test_the_export_holds_what_was_tuned_in_the_same_bytes(tuned, tmp_path):
    run, _, _ = tuned
    said: list[str] = []
    folder = export_run(run, tmp_path / "tuned", say=said.append)
    assert "tuning: exported" in said
    assert load_recipe(folder / "recipe.yaml").provenance.tuning == tensors_digest(used_tuning(run))
    opened, weights = get_denoiser(load_pipeline(folder)), TunedWeights.load(run.path(TUNED_FILE))
    for name, value in weights.others.items():
        assert torch.equal(opened.get_parameter(name).float(), value)
    for name, weight in weights.weights.items():
        assert torch.equal(opened.get_submodule(name).weight.float(), weight.dequantize(dtype=torch.float32))
    write_json(run.path(TUNING_FILE), read_json(run.path(TUNING_FILE)) | {"used": False})
    plain = export_run(run, tmp_path / "plain", say=said.append)
    write_json(run.path(TUNING_FILE), read_json(run.path(TUNING_FILE)) | {"used": True})
    one, other = (next((place / "transformer").glob("*.safetensors")) for place in (folder, plain))
    assert {k: v.nbytes for k, v in load_file(one).items()} == {k: v.nbytes for k, v in load_file(other).items()}
    assert load_recipe(plain / "recipe.yaml").provenance.tuning is None


def test_a_tuning_that_diverges_keeps_the_untuned_recipe(finished, tmp_path):
    run = Run.open(shutil.copytree(finished[0], tmp_path / "run"))
    before = run.path("recipe.yaml").read_bytes()
    with Engine(run, look_at(load_pipeline("digits-dit")), workers=1) as engine:
        assert tune_run(run, engine, finished[1], TuneSettings(steps=4, rows=4, every=2, rate=0.99), images=2) is None
    record = read_json(run.path(TUNING_FILE))
    assert record["used"] is False
    assert all(loss >= curve[0][1] for curve in record["curve"].values() for _, loss in curve)
    assert used_tuning(run) is None
    assert run.path("recipe.yaml").read_bytes() == before
    assert load_recipe(export_run(run, tmp_path / "export", say=str) / "recipe.yaml").provenance.tuning is None


def test_a_recipe_that_was_changed_by_hand_is_exported_untuned(tuned, tmp_path):
    run, _, _ = tuned
    copy = Run.open(shutil.copytree(run.folder, tmp_path / "run"))
    recipe = load_recipe(copy.path("recipe.yaml"))
    layer = next(name for name, label in recipe.layers.items() if label != "uniform-channel-4")
    changed = recipe.model_copy(update={"layers": {**recipe.layers, layer: "uniform-channel-4"}})
    copy.path("recipe.yaml").unlink()
    changed.save(copy.path("recipe.yaml"))
    said: list[str] = []
    export_run(copy, tmp_path / "export", say=said.append)
    assert any("tuning: left out" in line for line in said)
