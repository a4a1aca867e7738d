"""The house keeps its shape: imports run one way and in no circle, files and functions stay readable, no pickle."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import quantdm

PROJECT = Path(__file__).resolve().parents[1]
ROOT = PROJECT / "quantdm"

# Rooms from the bottom to the top: a room may import from itself and from any lower row.
ROWS = (
    ("errors", "progress", "processes", "registration"),
    ("files", "machine", "checked"),
    ("schemes",),
    ("recipe", "quantizers"),
    ("denoisers",),
    ("pipelines",),
    ("modules",),
    ("activations",),
    ("metrics",),
    ("bank",),
    ("correction", "tuning"),
    ("hub",),
    ("surrogates",),
    ("allocation",),
    ("runs",),
    ("report",),
    ("corridor",),
    ("cli",),
    ("__init__", "__main__"),
)
RANK = {room: rank for rank, row in enumerate(ROWS) for room in row}
FILES = sorted(ROOT.rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 300, 40  # lines; those of a docstring do not count in a function


def room_of(path: Path) -> str:
    """The first part of a module's path inside the package."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    """The dotted name of a module, e.g. quantdm.bank.weight_bank; a package's is that of its __init__."""
    return ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")


@cache
def tree_of(path: Path) -> ast.Module:
    """The parsed source of a file."""
    return ast.parse(path.read_text())


def imports_of(path: Path) -> list[str]:
    """Every module that a file imports, also inside functions and for type checking only."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function without those of its docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None and first.end_lineno is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    room = room_of(path)
    assert room in RANK, f"{room} has no row in ROWS: say where it stands"
    for module in imports_of(path):
        parts = module.split(".")
        if parts[0] == "quantdm" and len(parts) > 1 and parts[1] in RANK and parts[1] != room:
            assert RANK[parts[1]] < RANK[room], f"{path.name} imports {module}, which stands above it"


def test_no_circle_of_imports_not_even_inside_a_room():
    modules = {name_of(path): path for path in FILES}
    graph = {name: {m for m in imports_of(path) if m in modules and m != name} for name, path in modules.items()}
    for name, below in graph.items():  # `from package import module` needs the module, not what __init__ gathers
        below -= {m for m in below if any(other.startswith(f"{m}.") and name.startswith(f"{m}.") for other in below)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_diffusers_stays_at_the_border(path):
    if any(module.split(".")[0] == "diffusers" for module in imports_of(path)):
        assert room_of(path) in ("pipelines", "correction", "hub")


def test_no_file_outgrows_a_reader():
    files = [*FILES, *(PROJECT / "eval").rglob("*.py")]
    long = {str(p.relative_to(PROJECT)): n for p in files if (n := len(p.read_text().splitlines())) > MAX_FILE}
    assert not long, long


def test_no_function_outgrows_a_screen():
    files = [*FILES, *(PROJECT / "eval").rglob("*.py")]
    long = {
        f"{path.relative_to(PROJECT)}: {node.name}": lines
        for path in files
        for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (lines := lines_of(node)) > MAX_FUNCTION
    }
    assert not long, long


def test_every_file_says_what_it_is_in_its_first_line():
    assert not [str(path) for path in FILES if not path.read_text().startswith('"""')]


def test_the_readme_names_every_room():
    readme = (PROJECT / "README.md").read_text()
    rooms = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()}
    missing = [room for room in sorted(rooms) if f"`{room}/`" not in readme]
    assert not missing, missing


HEAVY = ("torch", "numpy", "diffusers", "transformers", "safetensors")
FURTHER = ("xgboost", "matplotlib", "sklearn", "torchmetrics", "quantdm.runs", "quantdm.surrogates", "quantdm.report")
IMPORTS = """
import builtins, sys
wanted, found, real = {wanted}, [], builtins.__import__
def watch(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {{}}).get("__name__") or ""
    if importer.startswith("quantdm") and any(name == w or name.startswith(w + ".") for w in wanted):
        found.append((importer, name))
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = watch
sys.argv = ["quantdm", *{arguments}]
try:
    {statement}
except SystemExit:
    pass
loaded = [name for name in wanted if name in sys.modules] if {strict} else []
print("FOUND", found, loaded)
"""


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], HEAVY),  # the package alone
        (["--help"], HEAVY),
        (["run", "--help"], HEAVY),
        (["status", "RUN"], HEAVY),
        (["inspect", "digits-dit"], FURTHER),
    ],
    ids=lambda found: " ".join(found) if isinstance(found, list) else "",
)
def test_nothing_heavy_is_imported_before_it_is_needed(arguments, wanted, tmp_path):
    """Of `inspect` only what quantdm asks for counts: some releases of transformers load scikit-learn themselves."""
    (tmp_path / "run.json").write_text('{"version": 2, "trials": 30}')
    arguments = [str(tmp_path) if each == "RUN" else each for each in arguments]
    statement = "from quantdm.cli.main import main; main()" if arguments else "import quantdm"
    code = IMPORTS.format(wanted=wanted, arguments=arguments, statement=statement, strict=wanted == HEAVY)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT)
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines()[-1] == "FOUND [] []"


def test_public_names_stand_where_they_are_imported_from():
    """What type checkers read and what is imported when it is asked for are the same names."""
    tree = tree_of(ROOT / "__init__.py")
    block = next(node for node in tree.body if isinstance(node, ast.If))
    read = {node.module: tuple(a.name for a in node.names) for node in block.body if isinstance(node, ast.ImportFrom)}
    assert read == quantdm._HOMES
    assert sorted(name for names in read.values() for name in names) == sorted(quantdm.__all__)


def test_no_pickle_and_no_eval():
    reader = ROOT / "hub/importer/plain_pickle.py"  # of files that others published: it admits no class, no function
    for path in FILES:
        assert path == reader or not {"pickle", "dill", "joblib"} & set(imports_of(path)), path
        calls = [n.func.id for n in ast.walk(tree_of(path)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        assert not {"eval", "exec"} & set(calls), path
