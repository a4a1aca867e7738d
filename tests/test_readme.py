"""What the README promises works as it is written there."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import quantdm
from quantdm.cli.app import OLDER_NAMES
from quantdm.cli.evaluate import PIPELINE
from quantdm.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_snippet_runs(tmp_path):
    code = SNIPPETS[0].replace("recipes/", f"{ROOT}/recipes/") + "\nassert len(images) == 3\n"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=300)
    packed = next((tmp_path / "digits-dit-3bit" / "transformer").glob("*.safetensors"))
    full = next((ROOT / "quantdm/pipelines/embedded/digits-dit/transformer").glob("*.safetensors"))
    assert packed.stat().st_size < full.stat().st_size


@pytest.mark.parametrize("snippet", SNIPPETS[1:])
def test_other_snippets_use_names_that_exist(snippet):
    compile(snippet, "README.md", "exec")
    for name in re.findall(r"quantdm\.(\w+)", snippet):
        assert hasattr(quantdm, name), name


def test_every_public_name_is_in_the_readme_and_exists():
    for name in quantdm.__all__:
        assert hasattr(quantdm, name), name
        assert f"`{name}`" in README, f"{name} is public but not in the README"


def test_the_readme_opens_with_two_commands_that_make_knows():
    first = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)[0]
    targets = re.findall(r"^make (\w+)", first, re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^quantdm (\w+)", README, re.MULTILINE))))
def test_every_command_in_the_readme_has_help_with_an_example(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"quantdm {command}" in result.output


def test_every_path_in_the_readme_exists():
    for path in re.findall(r"[(`\"]((?:docs|recipes|calib_data|eval)/[\w./-]+)", README):
        assert (ROOT / path).exists(), path


def commands() -> list[str]:
    """Every `quantdm ...` line of the README and of the docs, without its comment."""
    pages = [README, *((path.read_text()) for path in sorted((ROOT / "docs").glob("*.md")))]
    blocks = [block for page in pages for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.partition("  #")[0] for line in lines if line.startswith("quantdm ")]


def test_every_option_of_a_command_in_the_readme_and_the_docs_is_one():
    found = commands()
    assert len(found) > 40
    for line in found:
        command: Any = typer.main.get_command(app)
        words = shlex.split(line)[1:]
        while hasattr(command, "commands") and words and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        command = getattr(command, "commands", {}).get(PIPELINE, command)  # `evaluate` without a sub-command
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for word in words:
            if word.startswith("-"):
                name = word.partition("=")[0]
                assert f"--{OLDER_NAMES.get(name[2:], name[2:])}" in known or name in {*known, "--help", "--version"}, (
                    line
                )


def test_your_own_model_is_the_second_thing_in_the_readme_and_few_commands():
    first, second = re.split(r"^## ", README, flags=re.MULTILINE)[:2]
    assert first.startswith("# quantdm")
    assert second.startswith("Your own model\n")
    assert len(re.findall(r"^quantdm ", second, re.MULTILINE)) <= 5
    kinds = json.loads((ROOT / "eval/results/walk.json").read_text())["kinds"]
    assert len(kinds) == 20
    assert "Twenty kinds of pipelines were walked" in second
    assert all(set(kind["steps"].values()) == {"yes"} and kind["corrected"] for kind in kinds.values())
