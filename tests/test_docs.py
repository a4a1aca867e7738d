"""Every Python snippet in the documentation runs, page by page, in the order in which it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantdm.cli.main import app
from tests.family_models import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=lambda page: page.stem)
def test_the_snippets_of_a_page_run(page, tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    code = code.replace('"recipes/', f'"{ROOT}/recipes/')
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_commands_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (page.parent / target).exists(), target
    for command in set(re.findall(r"^quantdm ([\w-]+)", text, re.MULTILINE)):
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command


def test_the_support_page_lists_every_family_of_the_tests():
    rows = re.findall(r"^\| ([\w.-]+) \|", (ROOT / "docs" / "support.md").read_text(), re.MULTILINE)
    assert rows == list(FAMILIES), "write it again: see eval/support_matrix.py"
