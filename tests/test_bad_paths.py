"""Every command with every kind of bad path: exit code 2, one line, no traceback, nothing written."""

import sys
import time

import pytest

from quantdm import load_protocol
from quantdm.cli.main import main
from quantdm.files import write_json
from quantdm.runs.run import RunSettings
from tests.report_run import SEEN
from tests.test_writers import snapshot

# A complete command; each option in turn gets every bad value of its kind.
GOOD = {"MODEL": "digits-dit", "RECIPE": "good.yaml", "RUN": "new", "OLD": "run", "OUT": "out", "CONFIG": "config.pkl"}
COMMANDS = {
    "demo": "--run-dir RUN --quick",
    "bank": "MODEL --run-dir RUN --target-bits 3.0 --protocol PROTOCOL",
    "search": "MODEL --run-dir RUN --target-bits 3.0 --protocol PROTOCOL",
    "fit": "--run-dir OLD",
    "explain": "--run-dir OLD",
    "select": "--run-dir OLD --target-bits 3.0 -o FILE",
    "correct": "--run-dir OLD",
    "report": "--run-dir OLD",
    "export": "--run-dir OLD -o FOLDER",
    "apply": "MODEL --recipe RECIPE -o FOLDER",
    "import": "CONFIG --model MODEL -o YAML",
    "generate": "MODEL -o FILE --images 1 --steps 1 --protocol PROTOCOL",
    "evaluate": "MODEL --reference MODEL --images 2 --steps 1 --seeds 1 --protocol PROTOCOL",
    "inspect": "MODEL --recipe RECIPE",
}
# /proc/self/mem: a file that cannot be read
NOT_READABLE = ("missing", "folder", "empty", "binary", "file/below", "/proc/self/mem", "n" * 300)
NOT_WRITABLE = ("file/below", "/proc/nothing/below", "n" * 300)
FOREIGN_RUNS = ("file", "broken-run", "empty-run", "list-run", "old-run")
BAD = {
    "MODEL": ("missing", "folder", "file", "empty", "broken-pipe", "empty-pipe", "file/below", "n" * 300),
    "RECIPE": NOT_READABLE,
    "PROTOCOL": (*NOT_READABLE, "list.yaml"),
    "CONFIG": NOT_READABLE,
    "RUN": (*NOT_WRITABLE, *FOREIGN_RUNS, "filled"),
    "OLD": ("missing", "folder", "file/below", "n" * 300, *FOREIGN_RUNS),
    "FILE": (*NOT_WRITABLE, "folder", "file"),
    "FOLDER": (*NOT_WRITABLE, "file", "filled"),
    "YAML": ("file/below.yaml", "/proc/nothing/below.yaml", "folder.yaml", "good.yaml", "file", "filled"),
}
FILLED_IN = {**GOOD, "PROTOCOL": "digits-dit", "FILE": "out.yaml", "FOLDER": "out", "YAML": "out.yaml"}
CASES = [
    (command, template, option, bad)
    for command, template in COMMANDS.items()
    for option in BAD
    if option in template.split()
    for bad in BAD[option]
]


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder with everything that can be wrong in it, as the working directory."""
    for name in ("folder", "folder.yaml", "filled", "run", "broken-run", "empty-run", "list-run", "old-run"):
        (tmp_path / name).mkdir()
    for name in ("broken-pipe", "empty-pipe"):
        (tmp_path / name).mkdir()
    (tmp_path / "filled" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    (tmp_path / "good.yaml").write_text("model: digits-dit\ndefault: uniform-channel-4\n")
    (tmp_path / "config.pkl").write_bytes(b"\x80\x04}.")  # {}
    (tmp_path / "broken-run" / "run.json").write_text("{")
    (tmp_path / "empty-run" / "run.json").write_text("")
    (tmp_path / "list-run" / "run.json").write_text("[1]")
    (tmp_path / "old-run" / "run.json").write_text('{"version": 0}')
    (tmp_path / "broken-pipe" / "model_index.json").write_text(
        '{"_class_name": "DiTPipeline", "vae": ["diffusers", "X"]}'
    )
    (tmp_path / "empty-pipe" / "model_index.json").write_text("")
    settings = RunSettings(
        model="digits-dit", location="digits-dit", seen=SEEN, options=("uniform-channel-4",), target_bits=4.5,
        trials=30, seed=0,
        protocol=load_protocol("digits-dit"), label_images=2, label_steps=1, verify_images=2, noise_images=1,
        dtype="float32",
    )  # fmt: skip
    write_json(tmp_path / "run" / "run.json", settings.model_dump(mode="json"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_main(monkeypatch, capfd, arguments):
    """Run the command line in this process; return its exit code and what it wrote on standard error."""
    monkeypatch.setattr(sys, "argv", ["quantdm", *arguments])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, capfd.readouterr().err


@pytest.mark.parametrize(
    ("command", "template", "option", "bad"), CASES, ids=[f"{c[0]}-{c[2]}-{c[3][:12]}" for c in CASES]
)
def test_a_bad_path_is_one_line_before_anything_is_written(command, template, option, bad, places, monkeypatch, capfd):
    words = [bad if word == option else FILLED_IN.get(word, word) for word in template.split()]
    before = snapshot(places)
    start = time.monotonic()
    code, error = run_main(monkeypatch, capfd, [command, *words])
    lines = error.strip().splitlines()
    assert code == 2, error
    assert len(lines) == 1, error
    assert lines[0].startswith("error: "), error
    assert snapshot(places) == before
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("out", ["file/below", "/proc/nothing/below", "filled"])
@pytest.mark.parametrize("command", ["select", "generate", "export", "apply", "import"])
def test_the_place_is_looked_at_before_the_model(command, out, places, monkeypatch, capfd):
    """Nothing is loaded first: with a model that cannot be fetched the error is the one of the place."""
    lines = {
        "select": ["--run-dir", "run", "--target-bits", "3.0", "-o", out],
        "generate": ["nobody/nothing", "-o", out],
        "export": ["--run-dir", "run", "-o", out],
        "apply": ["nobody/nothing", "--recipe", "good.yaml", "-o", out],
        "import": ["config.pkl", "--model", "nobody/nothing", "-o", out],
    }
    code, error = run_main(monkeypatch, capfd, [command, *lines[command]])
    assert code == 2
    assert out in error, error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evaluate", "digits-dit", "--images", "1"], "images: got 1, expected 2 or more"),
        (["evaluate", "digits-dit", "--seeds", "-1"], "seeds: got"),
        (["correct", "--run-dir", "run", "--images", "1"], "images: got 1, expected 4 or more"),
        (["correct", "--run-dir", "run", "--bits", "9"], "bits: got 9"),
    ],
)
def test_numbers_out_of_range_are_one_line_too(arguments, expected, places, monkeypatch, capfd):
    code, error = run_main(monkeypatch, capfd, arguments)
    assert code == 2
    assert error.startswith("error: ")
    assert expected in error
