"""The search on the embedded DiT: resumable after kill -9, within its budget, one clear error for bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from quantdm import (
    QuantConfig,
    QuantDMError,
    Recipe,
    Scheme,
    apply_recipe,
    evaluate,
    get_denoiser,
    list_layers,
    load_pipeline,
    load_protocol,
    load_recipe,
)
from quantdm.bank.weight_bank import WeightBank
from quantdm.metrics import relative_error
from quantdm.metrics.samples import Draw
from quantdm.pipelines.generate import generate
from quantdm.pipelines.subject import look_at
from quantdm.runs.evaluator import Evaluator, Job, Probe
from quantdm.runs.run import Run
from quantdm.runs.search import start_run
from quantdm.runs.stages import build_bank
from quantdm.runs.store import TrialStore
from quantdm.runs.trials import load_trials
from quantdm.surrogates import SearchSpace
from tests.tiny_search import EFFORT, OPTIONS, TRIALS, run_search

TESTS = Path(__file__).parent


def test_every_stage_leaves_its_record(finished):
    folder, recipe = finished
    for name in (
        "run.json", "layers.json", "graph.json", "bank/index.json", "sensitivity.json", "space.json",
        "surrogate.json", "attribution.json", "selection.json", "recipe.yaml",
    ):  # fmt: skip
        assert (folder / name).is_file(), name
    assert len(TrialStore(folder / "trials")) == TRIALS
    assert load_recipe(folder / "recipe.yaml") == recipe
    assert not list(folder.rglob("*.tmp"))


def test_the_recipe_meets_its_budget_in_exact_bits(finished):
    folder, recipe = finished
    space = SearchSpace.load(folder / "space.json")
    choice = space.choice_of(recipe.config)
    assert space.total_bits(choice)[0] <= 3.2 * space.num_weights.sum()
    assert recipe.avg_bits == pytest.approx(float(space.avg_bits(choice)[0]), abs=1e-6)


def test_trials_cover_the_space_and_the_frontier(finished):
    folder, _ = finished
    space = SearchSpace.load(folder / "space.json")
    choices, y = load_trials(Run.open(folder), space)
    bits = space.avg_bits(choices)
    assert len(np.unique(choices, axis=0)) == TRIALS
    assert np.ptp(bits) > 1.0
    assert (np.abs(bits - 3.2) < 0.45).mean() > 0.4
    assert np.corrcoef(bits, y)[0, 1] > 0.3  # more bits, closer images


def test_killing_a_search_repeats_no_trial_and_changes_no_recipe(finished, tmp_path):
    folder, recipe = finished
    command = [sys.executable, "-m", "tests.tiny_search", str(tmp_path / "killed")]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # spinning threads crawl beside another busy process
    process = subprocess.Popen(
        command, cwd=TESTS.parent, env=one_thread, stderr=subprocess.DEVNULL, start_new_session=True
    )
    trials = tmp_path / "killed" / "trials"
    deadline = time.monotonic() + 400
    while len(list(trials.glob("*.json"))) < 7 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, "the search ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path.name: path.stat().st_mtime_ns for path in trials.glob("*.json")}
    assert 7 <= len(done) < TRIALS
    again = run_search(tmp_path / "killed", workers=1)
    assert {name: (trials / name).stat().st_mtime_ns for name in done} == done
    assert again == recipe  # one worker or two, disturbed or not
    assert {p.name for p in trials.glob("*.json")} == {p.name for p in (folder / "trials").glob("*.json")}


def test_running_a_finished_search_again_measures_nothing(finished, monkeypatch):
    folder, recipe = finished

    def fail(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(Evaluator, "samples", fail)
    monkeypatch.setattr(Evaluator, "propagate", fail)
    monkeypatch.setattr(Evaluator, "sensitivity", fail)
    assert run_search(folder, workers=1) == recipe


def test_a_swap_moves_pointers_and_comes_back(finished, dit):
    folder, recipe = finished
    denoiser = get_denoiser(dit)
    layers = list_layers(denoiser)
    bank = WeightBank.open(folder / "bank", layers, OPTIONS)
    original = {la.name: denoiser.get_parameter(f"{la.name}.weight").data_ptr() for la in layers}
    with bank.applied(denoiser, recipe.config):
        for layer in layers:
            weight = denoiser.get_parameter(f"{layer.name}.weight")
            assert torch.equal(weight, bank.get(layer.name, recipe.config[layer.name]).dequantize(dtype=torch.float32))
            assert weight.data_ptr() != original[layer.name]
    assert {la.name: denoiser.get_parameter(f"{la.name}.weight").data_ptr() for la in layers} == original


def test_sensitivity_is_the_error_of_one_layer(finished, dit):
    folder, _ = finished
    space = SearchSpace.load(folder / "space.json")
    evaluator = Evaluator(Run.open(folder), look_at(dit))
    name = space.layer_names[10]
    measured = evaluator.sensitivity(Probe(name, space.labels))
    assert space.noise_error[10].tolist() == pytest.approx(measured, rel=0.8)  # from 64 signs
    assert (space.noise_error[:, 0] > space.noise_error[:, 1]).all()  # 2 bits hurt every layer more than 4


def test_full_precision_measured_as_a_job_is_exact(finished, dit):
    evaluator = Evaluator(Run.open(finished[0]), look_at(dit))
    figures = evaluator.measure(Job(Draw(77, 20, 2)))
    assert figures["fid_fp"] < 1e-9
    assert figures["psnr_fp"] is None


def test_evaluate_orders_pipelines_as_their_noise(dit, finished):
    folder, _ = finished
    protocol = load_protocol("digits-dit")
    layers = list_layers(get_denoiser(dit))
    bank = WeightBank.open(folder / "bank", layers, OPTIONS)
    reference = generate(dit, protocol, range(50), steps=3)
    errors = []
    for scheme in (OPTIONS[0], OPTIONS[3]):
        with bank.applied(get_denoiser(dit), QuantConfig.uniform([la.name for la in layers], scheme)):
            errors.append(relative_error(generate(dit, protocol, range(50), steps=3), reference))
    assert errors[0] > 3 * errors[1] > 0
    same = evaluate(dit, protocol=protocol, reference=dit, num_images=20, seeds=(1, 2), steps=2)
    assert same["mean"]["fid_fp"] < 1e-9
    assert same["mean"]["psnr_fp"] is None
    assert len(same["rows"]) == 2
    json.dumps(same, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"target_bits": 1.0}, r"got 1\.0 bits per weight, but these options reach 2\.\d+ to 4\.\d+"),
        ({"target_bits": 9.0}, "reach"),
        ({"seed": 1}, r"seed is 0, asked for 1.*Choose another --run-dir"),
    ],
)
def test_bad_settings_are_one_clear_error(finished, dit, change, expected):
    folder, _ = finished
    with pytest.raises(QuantDMError, match=expected):
        run_search(folder, pipe=dit, **change)


def test_a_run_directory_of_another_model_version_or_kind_is_refused(finished, sd, tmp_path):
    folder, _ = finished
    with pytest.raises(QuantDMError, match="model is"):
        run_search(folder, pipe=sd)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(QuantDMError, match="not empty"):
        run_search(tmp_path, pipe=sd)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    record = json.loads((folder / "run.json").read_text()) | {"version": 99}
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.json").write_text(json.dumps(record))
    with pytest.raises(QuantDMError, match="version 99"):
        Run.open(other)


def test_a_budget_in_bytes_states_its_range_in_bytes(dit, tmp_path):
    from quantdm import search

    with pytest.raises(QuantDMError, match=r"got 1,000 bytes, but these options reach [\d,]+ to [\d,]+ bytes"):
        search(dit, target_bytes=1000, run_dir=tmp_path / "r")
    with pytest.raises(QuantDMError, match="exactly one of"):
        search(dit, run_dir=tmp_path / "r")
    with pytest.raises(QuantDMError, match="at least 30"):
        search(dit, target_bits=3.0, trials=5, run_dir=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_calibrated_options_are_calibrated_along_trajectories(tmp_path):
    pipe = load_pipeline("digits-dit")
    options = [Scheme.parse(f"kmeans-channel-{bits}{kind}") for bits in (2, 4) for kind in ("", "-feedback")]
    run, subject = start_run(
        look_at(pipe), tmp_path / "run", target_bits=3.0, trials=30, options=options, effort=EFFORT
    )
    bank = build_bank(run, subject)
    name = "transformer_blocks.2.ff.net.0.proj"
    plain, fed_back = (bank.get(name, scheme).dequantize() for scheme in options[:2])
    weight = pipe.transformer.get_parameter(f"{name}.weight")
    assert not torch.equal(plain, fed_back)
    # what is fed back serves the output, not the weight
    assert (weight - fed_back).square().sum() > (weight - plain).square().sum()
    with pytest.raises(QuantDMError, match="does not say on what"):
        apply_recipe(pipe, Recipe(model="digits-dit", default=options[1].label), insist=True)
