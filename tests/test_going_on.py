"""Whoever goes on with a run need not repeat how it started; what others taught it reaches every stage's command."""

import os
import shutil

import pytest
import torch
from typer.testing import CliRunner

from quantdm import QuantDMError, Scheme, load_pipeline
from quantdm.cli.main import app
from quantdm.files import read_json
from quantdm.pipelines.subject import look_at
from quantdm.runs import settings
from quantdm.runs.run import Run
from quantdm.runs.search import look_for_run, start_run
from quantdm.runs.settings import make_settings
from quantdm.runs.stages import LEARNED_FILE
from tests.pipeline_kinds import make
from tests.tiny_search import EFFORT, OPTIONS, TRIALS

BANK = [
    "--protocol",
    "unconditional",
    "--target-bits",
    "6",
    "--effort",
    "quick",
    "--options",
    "uniform-channel-4,uniform-channel-8",
]


def bank(*arguments: object) -> str:
    """Run `quantdm bank` and return what it says, an error as its text."""
    found = CliRunner().invoke(app, ["bank", *map(str, arguments)])
    return found.output if found.exception is None or isinstance(found.exception, SystemExit) else str(found.exception)


@pytest.fixture
def stored(tmp_path):
    """A tiny pipeline that is stored in bfloat16."""
    pipe, _ = make("ddpm")
    pipe.to(dtype=torch.bfloat16)
    pipe.save_pretrained(tmp_path / "pipe")
    return str(tmp_path / "pipe")


@pytest.mark.parametrize("said", ["first", "second"])
def test_a_dtype_is_said_once_whichever_time(said, stored, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "_free_dtype", lambda subject: "bfloat16")
    monkeypatch.setattr(settings, "fewest_steps", lambda pipe, protocol, least: least)  # DDPM refuses bfloat16
    run_dir, told = tmp_path / "run", {"first": [["--dtype", "bfloat16"], []], "second": [[], ["--dtype", "bfloat16"]]}
    for more in told[said]:
        found = bank(stored, "--run-dir", run_dir, *BANK, *more)
        assert "bank: /" in found
    run = Run.open(run_dir)
    assert run.settings.dtype == "bfloat16"
    assert run.settings.seen.parts["unet"].dtype == ("bfloat16" if said == "first" else "float32")
    wrong = bank(stored, "--run-dir", run_dir, *BANK, "--dtype", "float32")
    assert 'dtype is "bfloat16", asked for "float32"' in wrong


def test_a_bank_can_be_the_start_of_a_run_that_learns(stored, finished, tmp_path):
    options = ",".join(option.label for option in OPTIONS)
    asked = [stored, "--run-dir", tmp_path / "run", *BANK, "--options", options, "--target-bits", "3.9"]
    assert "bank: /" in bank(*asked, "--learned-from", finished[0])
    record = read_json(tmp_path / "run" / LEARNED_FILE)
    assert Run.open(tmp_path / "run").settings.learned == record["digest"]
    missing = bank("nowhere/at-all", "--run-dir", tmp_path / "other", "--target-bits", 3, "--learned-from", tmp_path)
    assert missing.startswith(f"learned from {tmp_path}: no run in")  # before anything is opened


def test_a_run_that_learned_goes_on_when_the_others_are_gone(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "donor")
    subject = look_at(load_pipeline("digits-dit"))
    asked = {"target_bits": 3.2, "trials": TRIALS, "options": OPTIONS, "effort": EFFORT}
    start_run(subject, tmp_path / "run", **asked, learned_from=[tmp_path / "donor"])
    shutil.rmtree(tmp_path / "donor")
    look_for_run(subject.pipe, tmp_path / "run", learned_from=[tmp_path / "donor"])
    with pytest.raises(QuantDMError, match=r"learned from .*donor.*run\.json is missing"):
        look_for_run(subject.pipe, tmp_path / "new", learned_from=[tmp_path / "donor"])


def test_options_that_leave_a_layer_without_any_are_one_clear_error():
    subject = look_at("digits-dit")
    asked = {"target_bits": 5.0, "target_bytes": None, "trials": TRIALS, "seed": 0}
    branched = Scheme.parse("uniform-channel-4-lowrank-20")
    with pytest.raises(QuantDMError, match=r"none of which fits pos_embed\.proj \(.*rank; add a scheme without"):
        make_settings(subject, **asked, options=[branched])
    made = make_settings(subject, **asked, options=[branched, Scheme.parse("uniform-channel-4")])
    assert made.options == (branched.label, "uniform-channel-4")


def test_what_a_killed_process_left_half_written_goes_when_the_run_goes_on(stored, tmp_path):
    run_dir = tmp_path / "run"
    bank(stored, "--run-dir", run_dir, *BANK)
    left, written = run_dir / "bank" / ".1234.tmp", run_dir / "bank" / ".5678.tmp"
    for path in (left, written):
        path.write_bytes(b"half")
    an_hour_ago = written.stat().st_mtime - 3700
    os.utime(left, (an_hour_ago, an_hour_ago))
    bank(stored, "--run-dir", run_dir, *BANK)
    assert not left.exists()
    assert written.exists()  # another process may be at it
