"""What the README promises works as it is written there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import quantdm
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
