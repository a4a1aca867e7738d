"""Every Python snippet in the documentation runs, page by page, in the order in which it stands there."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantdm.cli import doctor
from quantdm.cli.main import app
from quantdm.metrics.towers import EFFICIENTNET
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


def citations() -> dict[str, str]:
    """Return file -> its text on one line, without the marks of comments, so that a citation may run over a line."""
    sources = [path for room in ("quantdm", "tests", "eval") for path in sorted((ROOT / room).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): re.sub(r"\s*\n[\s#]*", " ", path.read_text()) for path in sources}


def test_every_page_that_the_code_names_is_in_the_project():
    """A reader finds what a comment cites: by its path from the root. In code a page's name stands in quotes alone."""
    named = 0
    for file, text in citations().items():
        for quote, page, end in re.findall(r"([\"']?)([\w./-]+\.md)\b([\"']?)", text):
            in_code = quote and quote == end
            named += 1
            assert (ROOT / page).is_file() or (in_code and (ROOT / "docs" / page).is_file()), f"{file} names {page}"
    assert named > 20


def test_every_section_that_the_code_cites_is_a_heading():
    cited = 0
    for file, text in citations().items():
        for page, rest in re.findall(r"(?<![\w/])(docs/\w+\.md), (?=[A-Z])(.{1,60})", text):
            headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
            cited += 1
            found = [heading for heading in headings if re.match(rf"{re.escape(heading)}\b", rest)]
            assert found, f"{file} cites {page}, {rest}"
    assert cited > 10


@pytest.fixture(scope="module")
def support():
    """The script that writes the support page, and the names of the tests that stand behind it."""
    spec = importlib.util.spec_from_file_location("support_matrix", ROOT / "eval" / "support_matrix.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    files = re.findall(r"tests/\w+\.py", script.__doc__)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        *files,
    ]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout
    return script, [line.partition("::")[2] for line in listed.splitlines() if "::" in line]


def test_every_cell_of_the_support_page_is_what_the_tests_cover(support):
    script, names = support
    page = (ROOT / "docs" / "support.md").read_text()
    # Every test that stands behind a cell is in this suite: where one fails, the suite fails too.
    assert page == script.page(dict.fromkeys(names, True)), "write it again: see its script"
    first = page.partition("## Which kinds of pipelines")[0]
    assert re.findall(r"^\| ([\w.-]+) \|", first, re.MULTILINE) == list(FAMILIES)
    assert "no" in script.table(dict.fromkeys(names, False))


def test_every_test_that_the_support_page_counts_on_exists_and_is_never_skipped(support):
    script, names = support
    for column, patterns in script.COLUMNS.items():
        for pattern in patterns:
            assert any(re.match(pattern, name) for name in names), (column, pattern)
    for file in re.findall(r"tests/\w+\.py", script.__doc__):
        assert not re.search(r"\bskip|xfail", (ROOT / file).read_text()), file


def test_what_the_support_page_says_of_pipelines_is_what_is_tested(support):
    _, names = support
    said = (ROOT / "docs" / "support.md").read_text().partition("Pipelines with ")[2].partition("schedulers")[0]
    tested = {name.partition("[")[2].rstrip("]") for name in names if name.startswith("test_a_pipeline_answers")}
    for scheduler in re.findall(r"[\w+-]+(?: matching)?", said.replace("flow-matching", "flow matching")):
        assert scheduler == "and" or any(name.startswith(scheduler) for name in tested), scheduler
    offloads = {name.partition("[")[2].rstrip("]") for name in names if name.startswith("test_an_offloaded_pipeline")}
    assert {"model", "group"} <= offloads


def test_the_tables_of_activations_are_what_was_measured():
    spec = importlib.util.spec_from_file_location("publish_activations", ROOT / "eval" / "publish_activations.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.PAGE.read_text()
    assert text == script.page(text), "write them again: see the script"
    assert "| plain, chosen per layer |" in text
    assert "| planted, chosen per layer |" in text


def test_every_package_that_is_offered_is_used():
    """What `doctor` misses and the extras install is imported, or run, somewhere in the project."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    offered = {re.match(r"[\w-]+", line).group().replace("-", "_") for lines in extras.values() for line in lines}
    offered |= set(doctor.OPTIONAL)
    tools = {"ruff", "pyright", "pytest_xdist", "pytest_timeout"}  # run by the Makefile, or plug-ins of pytest
    makefile, settings = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    assert all(word in makefile for word in ("ruff", "pyright", "-n 2"))
    assert "timeout = " in settings
    sources = [path.read_text() for room in ("quantdm", "eval", "tests") for path in (ROOT / room).rglob("*.py")]
    forms = r"^\s*(?:import|from) ([\w.]+)", r"import_module\(\"([\w.]+)\"\)"
    imported = {name for text in sources for form in forms for name in re.findall(form, text, re.MULTILINE)}
    imported |= set(EFFICIENTNET)  # imported by name, as they may be missing
    known = {"_".join(name.split(".")[:2]) for name in imported} | {name.partition(".")[0] for name in imported}
    assert offered - tools <= known, offered - tools - known
    for _, remedy in doctor.OPTIONAL.values():
        for extra in re.findall(r"quantdm\[(\w+)\]", remedy):
            assert extra in extras, remedy
