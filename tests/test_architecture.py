"""The house keeps its shape: imports run one way, diffusers stays at the border, importing quantdm stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "quantdm"

# Rooms from the bottom to the top: a room may import from itself and from any lower row.
ROWS = (
    ("errors", "progress"),
    ("files", "metrics"),
    ("schemes",),
    ("recipe", "quantizers"),
    ("denoisers",),
    ("modules",),
    ("correction", "hub"),
    ("surrogates",),
    ("search",),
    ("report",),
    ("export", "correct", "card"),
    ("corridor", "inspection", "listing", "doctor"),
    ("__init__", "cli"),
)
RANK = {room: rank for rank, row in enumerate(ROWS) for room in row}
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    """The first part of a module's path inside the package."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[str]:
    """Every module that a file imports, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    room = room_of(path)
    assert room in RANK, f"{room} has no row in ROWS: say where it stands"
    for module in imports_of(path):
        parts = module.split(".")
        if parts[0] == "quantdm" and len(parts) > 1 and parts[1] != room:
            assert RANK[parts[1]] < RANK[room], f"{path.name} imports {module}, which stands above it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_diffusers_stays_at_the_border(path):
    if any(module.split(".")[0] == "diffusers" for module in imports_of(path)):
        assert room_of(path) in ("denoisers", "correction", "hub")


def test_no_file_outgrows_a_reader():
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert not long, long


def test_importing_quantdm_loads_nothing_heavy():
    heavy = ("xgboost", "torch_geometric", "matplotlib", "sklearn")
    code = f"import sys, quantdm; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_no_pickle_and_no_eval():
    reader = ROOT / "hub/plain_pickle.py"  # of files that others published: it admits no class and no function
    for path in FILES:
        assert path == reader or not {"pickle", "dill", "joblib"} & set(imports_of(path)), path
        calls = [
            n.func.id
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        ]
        assert not {"eval", "exec"} & set(calls), path


def test_search_is_the_function_even_after_its_package_was_imported():
    code = "import quantdm.search.bank, quantdm; assert callable(quantdm.search)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
