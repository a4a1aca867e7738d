"""Every Python snippet in the documentation runs, and what the code cites is written there."""

import ast
import io
import re
import subprocess
import sys
import tokenize
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


def prose_of(path: Path) -> str:
    """The comments and docstrings of a Python file, each paragraph on one line."""
    text = path.read_text()
    lines = {
        t.start[0]: t.string.lstrip("# ")
        for t in tokenize.generate_tokens(io.StringIO(text).readline)
        if t.type == tokenize.COMMENT
    }
    parts = [("\n" if number - 1 not in lines else " ") + comment for number, comment in lines.items()]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    strings = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    return "".join(parts) + "\n" + "\n".join(re.sub(r"(?<!\n)\n(?!\n)", " ", string) for string in strings)


SOURCES = sorted(p for room in ("quantdm", "tests", "eval") for p in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_that_a_comment_cites_exists_and_has_the_section(path):
    for page, section in re.findall(r"([\w./-]+\.md)\b(?:, ([A-Z][^\n]*))?", prose_of(path)):
        assert (ROOT / page).is_file(), f"{page} is not in the project"
        headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
        assert not section or any(re.match(rf"{re.escape(h)}\b", section) for h in headings), f"{page}: no {section!r}"
        assert not re.search(rf"{re.escape(page)} section", prose_of(path)), f"{page}: cite a heading, not a number"
