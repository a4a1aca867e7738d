"""The whole way with a pipeline of one's own: a sampler that is not corrected, and a report of all the rest."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from typer.testing import CliRunner

import quantdm
from quantdm import QuantDMError, load_pipeline, load_protocol
from quantdm.cli.app import size_in_bytes
from quantdm.cli.main import app
from quantdm.corridor.levels import LEVELS, Level, level_of
from quantdm.corridor.run import default_folder, device_of, run
from quantdm.machine import best_device
from quantdm.pipelines.generate import generate
from quantdm.report.page import SECTIONS
from quantdm.report.records import read_records
from quantdm.runs.settings import MIN_TRIALS, Effort
from quantdm.tuning import TuneSettings
from tests.tiny_search import OPTIONS

TINY = Level(MIN_TRIALS, Effort(16, 2, 16, 1, 2, 0), 16, 8, TuneSettings(steps=4, rows=4, every=2), 4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole run of a live pipeline with a multistep sampler; what was said."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pipe = load_pipeline("digits-dit")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    protocol, said = load_protocol("digits-dit").model_copy(update={"steps": 3}), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LEVELS, "tiny", TINY)
        summary = run(
            pipe,
            target_bits=3.2,
            run_dir=folder,
            effort="tiny",
            options=OPTIONS,
            protocol=protocol,
            workers=1,
            say=said.append,
        )
    return folder, summary, said, pipe, protocol


def test_every_stage_is_announced_and_what_is_left_out_is_said(whole):
    _, _, said, _, _ = whole
    stages = [line for line in said if line.startswith("[")]
    assert [line.split("/")[0] for line in stages] == [f"[{i}" for i in range(1, 11)]
    assert any("activations and the sampler's correction" in line for line in said)
    assert all(len(line) <= 300 for line in said)  # the longest says why the correction is left out


def test_the_summary_has_all_rows(whole):
    folder, summary, _, _, _ = whole
    names = [row["name"] for row in summary["rows"]]
    assert {"fp", "uniform-next-width", "least-weight-error", "sensitivity-same-size", "recipe", "recipe+a6"} <= {
        *names
    }
    assert "recipe+a6+correction" in names
    assert summary["tuning"]["curve"]["transformer"][0][0] == 0
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_nothing_is_missing_in_the_report(whole):
    folder, _, _, _, _ = whole
    page = (folder / "report.html").read_text()
    assert page.count('class="missing"') == 0
    records = read_records(folder)
    missing = [key for key, _, build in SECTIONS if 'class="missing"' in build(records)]
    assert missing == []


def test_the_export_opens_in_a_new_process_with_the_sampler_that_was_given(whole, tmp_path):
    folder, _, _, _, protocol = whole
    opened = load_pipeline(folder / "export")
    assert type(opened.scheduler) is DPMSolverMultistepScheduler
    code = (
        "import quantdm, torch\nfrom quantdm.pipelines.generate import generate\n"
        f"pipe = quantdm.load_pipeline({str(folder / 'export')!r})\n"
        "protocol = quantdm.load_protocol('digits-dit').model_copy(update={'steps': 3})\n"
        f"torch.save(generate(pipe, protocol, range(3)), {str(tmp_path / 'images.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    images = torch.load(tmp_path / "images.pt", weights_only=True)
    assert torch.equal(images, generate(opened, protocol, range(3)))


def test_a_second_call_does_nothing_again(whole, monkeypatch):
    folder, summary, _, pipe, protocol = whole
    monkeypatch.setitem(LEVELS, "tiny", TINY)
    before = {p: p.stat().st_mtime_ns for p in (folder / "trials").iterdir()}
    again = run(
        pipe, target_bits=3.2, run_dir=folder, effort="tiny", options=OPTIONS, protocol=protocol, workers=1, say=str
    )
    assert again["rows"] == summary["rows"]  # the seconds too: nothing was measured a second time
    assert {p: p.stat().st_mtime_ns for p in (folder / "trials").iterdir()} == before


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("900", 900),
        ("900 B", 900),
        ("1.2GB", 1_200_000_000),
        ("3 mb", 3_000_000),
        ("2MiB", 2**21),
        ("1.5g", 1_500_000_000),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "big", "-3GB", "1.2 parsecs", "1e9", "B"])
def test_what_is_no_size_is_one_clear_error(text):
    with pytest.raises(QuantDMError, match="expected bytes or a number with B, kB, MB"):
        size_in_bytes(text)


def test_efforts_and_folders_have_names():
    assert level_of("quick").trials < level_of("normal").trials < level_of("thorough").trials
    assert level_of("normal", trials=77).trials == 77
    with pytest.raises(QuantDMError, match="effort: got 'fast'"):
        quantdm.run("digits-dit", target_bits=3.0, effort="fast")
    assert str(default_folder("a/b", 3.5, None, "normal")) == "runs/b-3.5bit"
    assert str(default_folder("b", None, 900, "quick")) == "runs/b-900bytes-quick"
    assert str(default_folder("b", None, None, "normal", 900)) == "runs/b-900bytes-in-all"


def test_a_live_pipeline_says_itself_where_it_lies():
    assert device_of(SimpleNamespace(device=torch.device("mps:0"))) == "mps"
    assert device_of("digits-dit") == best_device()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "digits-dit", "--target-bits", "3", "--effort", "fast"], "effort: got 'fast'"),
        (["run", "digits-dit", "--target-bits", "3", "--options", "kmeans-4"], "scheme: got 'kmeans-4'"),
        (["run", "digits-dit", "--run-dir", "RUN"], "give exactly one of target_bits"),
        (["tune", "--run-dir", "RUN"], "run.json is missing"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, tmp_path):
    place = tmp_path / "run"
    result = CliRunner().invoke(app, [str(place) if a == "RUN" else a for a in arguments])
    assert isinstance(result.exception, QuantDMError)
    assert message in str(result.exception)
    assert not place.exists()
