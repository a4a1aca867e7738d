"""Help that reads well in eighty columns, commands in the order of use, and errors in our own words."""

import json
import re
import sys

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from quantdm import QuantDMError, Scheme, load_protocol, load_recipe
from quantdm.cli.app import size_in_bytes
from quantdm.cli.group import PANELS
from quantdm.cli.layer_table import layers_text
from quantdm.cli.main import app, main
from quantdm.correction.record import _activations
from quantdm.errors import counted
from quantdm.hub.config import QuantDMConfig
from quantdm.hub.inspection import inspect_target
from quantdm.recipe.activations import ActivationScheme
from quantdm.runs.run import MIN_TRIALS, Run
from tests.pipeline_kinds import BarePipeline, unet

START = re.compile(r"│ [ *]* *--")
OPTION = re.compile(r"│ [ *]* *(--[a-z-]+ +)(-\w +)?(--no-[a-z-]+ +)?([A-Z][A-Z,.]*( \[\S+\])? +)?")


@pytest.fixture
def narrow(monkeypatch):
    """A terminal of eighty columns."""
    monkeypatch.setenv("COLUMNS", "80")


def help_of(*words):
    return CliRunner().invoke(app, [*words, "--help"], catch_exceptions=False).output


def test_commands_are_listed_as_they_are_met_each_in_one_panel(narrow):
    text = help_of()
    titles = [text.index(f"─ {title} ─") for title in PANELS]
    assert titles == sorted(titles)
    names = [name for panel in PANELS.values() for name in panel]
    assert sorted(names) == sorted(get_command(app).commands)  # none is left over, none is listed twice
    assert re.findall(r"^│ ([a-z]+) ", text, re.MULTILINE) == names
    assert names[:4] == ["inspect", "run", "demo", "apply"]


@pytest.mark.parametrize("command", ["run", "search", "bank", "demo", "apply", "tune", "correct", "bench", "select"])
def test_the_text_of_an_option_has_half_of_the_line(narrow, command):
    lines = [line for line in help_of(command).splitlines() if START.match(line)]
    assert not any("<bool>" in line for line in lines)  # an option without a value
    starts = [found.end() for line in lines if (found := OPTION.match(line))]
    assert len(starts) == len(lines) > 1
    assert max(starts) <= 46


def test_what_evaluate_is_short_for_is_said_where_it_is_looked_for(narrow):
    for words in (["evaluate"], ["evaluate", "pipeline"]):
        assert "is short for" in help_of(*words)
    assert "evaluate pipeline MODEL" in " ".join(help_of().split())
    found = [CliRunner().invoke(app, ["evaluate", *more, "digits-dit", "--seeds", "a"]) for more in ([], ["pipeline"])]
    assert str(found[0].exception) == str(found[1].exception) != ""


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (["--trials", "abc"], "--trials: got abc, expected a whole number"),
        (["--trials", "12"], f"--trials: got 12, expected {MIN_TRIALS} or more"),
        (["--seed", "1.5"], "--seed: got 1.5, expected a whole number"),
        (["--minutes", "soon"], "--minutes: got soon, expected a number"),
        (["--target-bits", "many"], "--target-bits: got many, expected a number"),
        *((["--target-size", size], f"--target-size: size: got '{size}', expected bytes or a number with B, kB")
          for size in ("abc", "1.2XB", "-5MB", "0", "0.0001kB", "")),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_read_is_one_line_that_repeats_it(said, expected, monkeypatch, capsys, tmp_path):
    words = ["run", "nowhere", "--run-dir", str(tmp_path / "run"), *said]
    monkeypatch.setattr(sys, "argv", ["quantdm", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert error.startswith(f"error: {expected}")
    assert "\n" not in error
    assert not list(tmp_path.iterdir())


def test_sizes_are_read_with_and_without_units():
    assert size_in_bytes("1.2GB") == 1_200_000_000
    assert size_in_bytes(" 5 mib ") == size_in_bytes("5M") * 2**20 // 10**6 == 5 * 2**20
    assert size_in_bytes("7") == 7


def test_a_word_that_is_nearly_a_sub_command_is_not_taken_for_a_pipeline():
    found = CliRunner().invoke(app, ["evaluate", "genrate", "digits-dit"])
    assert "generate" in str(found.exception) + found.output


RECIPE = "version: 1\nmodel: digits-dit\ndefault: uniform-channel-4\n"


def _recipe(tmp_path, more):
    (tmp_path / "r.yaml").write_text(RECIPE + more)
    return load_recipe(tmp_path / "r.yaml")


def _protocol(tmp_path, **said):
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"version": 2, "steps": 2, "features": "pyramid", **said}))
    return load_protocol(tmp_path / "p.yaml")


def _run(folder, tmp_path, **said):
    record = json.loads((folder / "run.json").read_text())
    record["protocol"] |= said
    (tmp_path / "run.json").write_text(json.dumps(record))
    return Run.open(tmp_path)


WRONG = {
    "scheme": (lambda *_: Scheme.parse("kmeans-channel-99"), "scheme 'kmeans-channel-99': 99 bits, expected 2 to 8"),
    "activation scheme": (lambda *_: ActivationScheme.parse("token-9"), "scheme 'token-9': got 9 bits, expected 3 to"),
    "recipe": (lambda t, _: _recipe(t, "layers: {a: kmeans-4}\n"), "got 'kmeans-4'"),
    "activations of a recipe": (lambda t, _: _recipe(t, "activations: {default: token-99}\n"), "token-99"),
    "calibration of a recipe": (lambda t, _: _recipe(t, "calibration: {protocol: x, images: 0}\n"), "images"),
    "protocol": (lambda t, _: _protocol(t, argument="prompt"), "values: missing; argument and values go together"),
    "rows": (lambda t, _: _protocol(t, rows=[{"prompt": "a"}, {"size": 2}]), "has other arguments than rows.0"),
    "a run's protocol": (lambda t, run: _run(run, t, steps=0), "protocol: steps: "),
    "an export's activations": (lambda *_: QuantDMConfig(activations={"bits": 99}), "activations"),
    "a correction's activations": (lambda t, _: _activations(t, {"bits": 99}), "activations"),
}


@pytest.mark.parametrize("what", WRONG)
def test_no_error_of_a_file_is_told_in_the_words_of_what_reads_it(what, tmp_path, request):
    read, expected = WRONG[what]
    run = request.getfixturevalue("finished")[0] if "run" in what else None
    with pytest.raises(QuantDMError) as error:
        read(tmp_path, run)
    told = str(error.value)
    assert expected in told
    assert not re.search(r"[Vv]alue error|pydantic|validation error|\n", told)


def test_one_thing_is_named_as_one(tmp_path):
    assert [counted(n, "layer") for n in (0, 1, 2, 1024)] == ["0 layers", "1 layer", "2 layers", "1,024 layers"]
    BarePipeline(unet(), None).unet.save_pretrained(tmp_path / "unet")
    text = layers_text(inspect_target(str(tmp_path / "unet")))
    assert re.search(r"% of the weights, 1 layer$", text, re.MULTILINE)
    assert not re.search(r"\b1 layers", text)
