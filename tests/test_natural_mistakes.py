"""What people give where something else is expected: one clear error that says what it was and what to do."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline
from typer.testing import CliRunner

import quantdm
from quantdm import QuantDMError
from quantdm.activations.hooks import set_activation_bits_
from quantdm.cli.main import app
from quantdm.cli.measure import _told
from quantdm.modules.residency import set_residency
from quantdm.pipelines.subject import look_at
from quantdm.runs.engines.choice import open_engine
from quantdm.runs.run import SNAPSHOT
from tests.pipeline_kinds import make

PROTOCOL = quantdm.load_protocol("unconditional")
SEARCH: dict[str, Any] = {"target_bits": 3.0, "run_dir": "never-made", "protocol": PROTOCOL}


@pytest.fixture(scope="module")
def pipe():
    return make("ddpm")[0]


MISTAKES = {
    "an effort for run": (lambda p: quantdm.run(p, effort=quantdm.Effort(), **SEARCH), 'effort: got one.*"quick"'),
    "a word for search": (lambda p: quantdm.search(p, effort="quick", **SEARCH), r"effort: got 'quick'.*Effort\("),
    "a name of a protocol": (
        lambda p: quantdm.search(p, **{**SEARCH, "protocol": "mine.yaml"}),
        "protocol: got 'mine.yaml'.*load_protocol",
    ),
    "for generate": (lambda p: quantdm.generate(p, "mine.yaml", range(2)), "protocol: got 'mine.yaml'.*load_protocol"),
    "for evaluate": (lambda p: quantdm.evaluate(p, protocol="mine.yaml"), "protocol: got 'mine.yaml'.*load_protocol"),
    "labels for schemes": (
        lambda p: quantdm.search(p, options=["kmeans-channel-3"], **SEARCH),
        r"options: got 'kmeans-channel-3'.*Scheme\.parse",
    ),
    "one label": (lambda p: quantdm.search(p, options="kmeans-channel-3", **SEARCH), "options: got 'kmeans-channel-3'"),
    "a text for a number": (
        lambda p: quantdm.search(p, **{**SEARCH, "target_bits": "3"}),
        "target_bits: got '3' of the type str; give a number",
    ),
    "a path for a pipeline": (lambda p: quantdm.apply_recipe("models/x", "r"), "pipeline: got models/x.*load_pipeline"),
    "a network for a pipeline": (lambda p: quantdm.search(p.unet, **SEARCH), "pipeline: got a UNet2DModel"),
    "a pipeline for a network": (lambda p: set_residency(p, "int8"), "model: got one of the type .*get_denoiser"),
    "bits for a spec": (lambda p: set_activation_bits_(p.unet, 6), "spec: got 6 of the type int; .*usual_activations"),
    "a label for a scheme": (
        lambda p: quantdm.quantize_weight(torch.ones(2, 2), "kmeans-channel-4"),
        r"scheme: got 'kmeans-channel-4'.*Scheme\.parse",
    ),
    "a number of seeds": (lambda p: quantdm.generate(p, PROTOCOL, 3), r"seeds: got 3, .*range\(8\)"),
    "no steps": (lambda p: quantdm.generate(p, PROTOCOL, [3], steps=0), "steps: got 0, expected 1 or more"),
    "less than none": (lambda p: quantdm.evaluate(p, protocol=PROTOCOL, steps=-1), "steps: got -1, expected 1 or more"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_it_says_what_was_given_and_what_to_do(what, pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if what == "a path for a pipeline":
        quantdm.Recipe(model="x", default="uniform-channel-4").save(tmp_path / "r")
    mistake, message = MISTAKES[what]
    with pytest.raises(QuantDMError, match=message):
        mistake(pipe)
    assert not Path("never-made").exists()


def test_a_recipe_may_be_given_to_export_by_its_path(tmp_path, pipe):
    pipe.save_pretrained(tmp_path / "source")
    recipe = quantdm.Recipe(model="x", default="uniform-channel-4")
    recipe.save(tmp_path / "r.yaml")
    quantdm.export_pipeline(tmp_path / "source", str(tmp_path / "r.yaml"), tmp_path / "made")
    assert quantdm.load_recipe(tmp_path / "made" / "recipe.yaml").default == recipe.default


@pytest.mark.parametrize("read", [quantdm.load_protocol, "inputs"], ids=["protocol", "example inputs"])
def test_a_key_that_stands_twice_is_refused_with_both_lines(read, tmp_path):
    from quantdm.denoisers.given_inputs import read_inputs

    (tmp_path / "p.yaml").write_text("version: 2\nsteps: 2\nguidance_scale: 1\nsteps: 3\n")
    with pytest.raises(QuantDMError, match=r"p\.yaml: line 4: 'steps' stands on line 2 already; remove one of the two"):
        (read_inputs if read == "inputs" else read)(tmp_path / "p.yaml")


def test_inspect_shows_what_is_calibrated_without_its_error(tmp_path, pipe):
    pipe.save_pretrained(tmp_path / "source")
    schemes = {"default": "kmeans-channel-3-feedback", "patterns": {"conv_in": "uniform-channel-8"}}
    quantdm.Recipe(model="x", **schemes).save(tmp_path / "r.yaml")
    asked = ["inspect", str(tmp_path / "r.yaml"), "--model", str(tmp_path / "source")]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == 0, found.exception
    assert "kmeans-channel-3-feedback" in found.stdout
    assert "-: no SQNR without the inputs of the layer" in found.stdout
    first = next(line for line in found.stdout.splitlines() if line.split()[:1] == ["conv_in"])
    assert re.search(r"uniform-channel-8 +\S+ +\d+\.\d$", first)  # what is not calibrated has its error


class Mine(DDPMPipeline):
    """A pipeline of the user's own."""


def test_a_class_of_ones_own_is_refused_before_work_where_processes_would_open_it(pipe, tmp_path):
    own, folder = Mine(**pipe.components), tmp_path / SNAPSHOT
    run = SimpleNamespace(path=lambda name: folder)
    subject = look_at(own)
    object.__setattr__(subject, "location", str(folder.resolve()))
    with pytest.raises(QuantDMError, match=r"Mine: is a class of your own, .*pass workers=1"):
        open_engine(run, subject, "local", workers=2, batch_size="auto")  # type: ignore[arg-type]


def test_correct_says_what_no_correction_has_and_what_is_kept():
    measured = {"none": [1e-6, 3e-6], "bias": [5e-7, 7e-7]}
    kept = SimpleNamespace(measured=measured, choice="bias")
    lines = _told(kept)  # type: ignore[arg-type]
    assert lines[0].split()[:3] == ["none", "fid_fp", "2e-06"]
    assert lines[1].endswith("<- kept")
    assert "none is in use" in _told(SimpleNamespace(measured=measured, choice="none"))[-1]  # type: ignore[arg-type]
