"""The command line: pasteable help, plain data on request, one line for bad input, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

import quantdm.cli.main as program
from quantdm.cli.main import app, main

COMMANDS = (
    "demo", "run", "tune", "inspect", "bank", "search", "fit", "explain", "select", "apply", "correct", "generate",
    "evaluate", "export", "report", "doctor", "bench",
)  # fmt: skip


def run(*arguments):
    """Run a command in this process and return its output."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_stage_has_a_command_whose_help_can_be_pasted(command):
    help_text = run(command, "--help")
    assert f"quantdm {command}" in help_text
    assert all(len(line) <= 80 for line in help_text.splitlines())


def test_inspect_prints_tables_of_79_columns_and_plain_json():
    table = run("inspect", "digits-sd", "--scheme", "kmeans-channel-4")
    assert "(2)" in table
    assert all(len(line) <= 79 for line in table.splitlines())
    record = json.loads(run("inspect", "digits-dit", "--scheme", "uniform-channel-4", "--json"))
    weights = [row for row in record["layers"] if row["kind"] == "weight"]
    assert record["num_weights"] == sum(row["num_weights"] for row in weights)
    assert 4 < record["avg_bits"] < 4.5
    assert all(10 < row["sqnr_db"] < 40 for row in weights)
    tables = [row for row in record["layers"] if row["kind"] == "embedding"]
    assert len(tables) == 6
    assert all(row["sqnr_db"] > 40 for row in tables)


def test_generate_writes_a_grid(tmp_path):
    run("generate", "digits-dit", "-o", str(tmp_path / "grid.png"), "--images", "6", "--columns", "3", "--steps", "2")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (96, 64)
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_bench_prints_a_row_for_every_residency(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = ["bench", "digits-dit", "--activations", "token-8", "--steps", "2"]
    table = CliRunner().invoke(app, options, catch_exceptions=False).stdout  # without the bars on standard error
    assert all(len(line) <= 79 for line in table.splitlines())
    asked = [*options, "--scheme", "uniform-channel-4", "--json"]
    record = json.loads(CliRunner().invoke(app, asked, catch_exceptions=False).stdout)
    rows = {row["residency"]: row for row in record["rows"]}
    assert list(rows) == ["original", "packed", "int8", "dense", "integer", "auto"]
    assert all(name in table for name in rows)
    assert rows["packed"]["nbytes"] < rows["integer"]["nbytes"] < rows["dense"]["nbytes"]
    assert rows["packed"]["distance"] == rows["int8"]["distance"] == 0
    assert 0 < rows["integer"]["distance"] < 0.05  # where bfloat16 is fast, its own roundings are as large


def test_doctor_names_versions_and_pipelines():
    record = json.loads(run("doctor", "--json"))
    assert "digits-dit, digits-flow, digits-sd" in record["embedded pipelines"]
    assert record["torch"]


GONE = ["run", "nobody/gone", "--target-bits", "3", "--run-dir", "RUN"]  # opened last: it may have to be downloaded


def test_an_older_name_of_an_option_is_still_known():
    found = CliRunner().invoke(app, ["bank", "nowhere", "--run-dir", "x", "--target-bytes", "many"])
    assert "size: got 'many'" in found.output + str(found.exception)


def test_search_takes_what_run_takes():
    known = {
        name: {o for p in typer.main.get_command(app).commands[name].params for o in p.opts}
        for name in ("run", "search")
    }
    asked = {"--effort", "--options", "--workers", "--batch-size", "--device", "--dtype", "--dry-run", "--trials"}
    assert asked <= known["search"]
    assert known["search"] <= known["run"]


@pytest.mark.parametrize("command", ["run", "search", "bank", "demo"])
def test_help_fits_eighty_columns_with_room_to_read(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = CliRunner().invoke(app, [command, "--help"]).output
    assert max(map(len, text.splitlines())) <= 80
    options = text.partition("Options")[2].partition("╰")[0].splitlines()
    assert options
    assert not [line for line in options if "…" in line.partition("<")[0]]  # names are not cut


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["inspect", "digits-sdx"], "digits-dit, digits-flow, digits-sd"),
        (["inspect", "digits-dit", "--scheme", "kmeans-4"], "kmeans-channel-4"),
        (["demo", "--target-bits", "1.5", "--run-dir", "RUN"], "reach"),
        (["fit", "--run-dir", "RUN"], "run.json is missing"),
        (["report", "--run-dir", "RUN"], "run"),
        (["apply", "digits-dit", "--recipe", "RUN/none.yaml", "-o", "RUN/out"], "no file"),
        (["evaluate", "digits-dit", "--seeds", "a,b"], "whole numbers"),
        ([*GONE, "--engine", "rya"], "engine: got 'rya'; known: local, ray"),
        ([*GONE, "--ray-address", "auto"], "expected engine ray"),
        pytest.param([*GONE, "--engine", "ray", "--ray-address", "127.0.0.1:1"], "no cluster at 127.0.0.1:1",
                     marks=pytest.mark.skipif(find_spec("ray") is None, reason="the extra ray is not installed")),
        ([*GONE, "--fidelity", "high"], "fidelity: got 'high'; known: full, auto"),
        ([*GONE, "--gpu-hours", "1", "--device", "cpu"], "no accelerator works here; give minutes"),
        ([*GONE, "--gpu-hours", "1", "--minutes", "5"], "give one of them"),
        ([*GONE, "--effort", "high"], "effort: got 'high'; known: quick, normal, thorough"),
        ([*GONE, "--dtype", "int8"], "dtype: got 'int8'"),
        ([*GONE, "--device", "gpu"], "device: got 'gpu', expected cpu, cuda"),
        ([*GONE, "--options", "kmeans-4"], "kmeans-channel-4"),
        ([*GONE, "--protocol", "text-to-image"], "text-to-image-64"),
        (["search", *GONE[1:], "--effort", "high"], "effort: got 'high'"),
        (["search", *GONE[1:], "--engine", "rya"], "engine: got 'rya'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(monkeypatch, capsys, tmp_path, arguments, expected):
    arguments = [a.replace("RUN", str(tmp_path / "run")) for a in arguments]
    monkeypatch.setattr(sys, "argv", ["quantdm", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert expected in error
    assert not list(tmp_path.iterdir())


def test_apply_refuses_a_recipe_for_another_model_and_a_folder_that_is_not_its_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text("version: 1\nmodel: other\nlayers: {blocks.0.fc: kmeans-channel-4}\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for out, expected in (("new", "blocks.0.fc"), ("mine", "is no export")):
        arguments = ["apply", "digits-dit", "--recipe", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / out)]
        monkeypatch.setattr(sys, "argv", ["quantdm", *arguments])
        with pytest.raises(SystemExit):
            main()
        assert expected in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "recipe.yaml"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_the_installed_command_answers():
    out = subprocess.run([sys.executable, "-m", "quantdm.cli", "--help"], capture_output=True, text=True, check=True)
    assert all(command in out.stdout for command in COMMANDS)


def test_an_error_that_a_library_makes_of_ctrl_c_is_an_interruption(monkeypatch, capsys):
    def turned():
        try:
            program._interrupt()
        except program.Interrupted:
            raise ValueError("could not determine the shape of object type") from None

    monkeypatch.setattr(program, "app", turned)
    monkeypatch.setattr(program.Interrupted, "asked", False)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit, match="130"):
            program.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on_and_leaves_no_process(tmp_path):
    command = [sys.executable, "-m", "quantdm.cli", "demo", "--quick", "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "bank" / "index.json").is_file() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "run the same command again to go on" in error
    assert not list(tmp_path.rglob("*.tmp"))
    deadline = time.monotonic() + 30  # Python's own resource tracker leaves last
    while group_exists(process.pid):
        assert time.monotonic() < deadline, "a worker outlived the search"
        time.sleep(0.1)


def group_exists(group):
    """Whether any process of a process group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
