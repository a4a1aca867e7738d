"""Run the tests with the lowest and with the newest versions that pyproject.toml allows, side by side.

    python eval/check_versions.py                    # an hour; writes eval/results/versions.json
    python eval/check_versions.py --only lowest --tests tests/test_hub.py tests/test_lora.py

Each of the two environments is made anew in `--folder`. "Lowest" is the lower bound of every direct dependency, with
the newest of whatever those need; "newest" is what pip takes today. torch is the locked release in both: other CPU
builds are not on PyPI. The test that the environment is the locked one is left out, and warnings that a library is
outdated are no failures here: old libraries meet new ones.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import time
import tomllib
import venv
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from quantdm.files import write_json
from quantdm.machine import cores

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "eval" / "results" / "versions.json"
BACKEND = ("hatchling", "editables")
KINDS = ("lowest", "newest")
TORCH_NOTE = "the locked release in both environments, CPU build: no other was at hand"
IGNORED = ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::PendingDeprecationWarning")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=KINDS, help="one of the two environments")
    parser.add_argument("--folder", type=Path, default=Path(".versions"), help="where the environments are made")
    parser.add_argument("--workers", type=int, default=1, help="test processes")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="test files; the record is written for all only")
    args = parser.parse_args()
    record: dict[str, Any] = json.loads(OUT.read_text()) if OUT.is_file() else {}
    for kind in [args.only] if args.only else KINDS:
        python = make_environment(kind, args.folder / kind)
        record[kind] = {"date": f"{datetime.date.today()}", **installed(python)}
        record[kind] |= run_tests(python, args.tests, args.workers, args.folder / f"{kind}.xml")
        print(kind, {key: value for key, value in record[kind].items() if key != "versions"}, flush=True)
        if args.tests == ["tests"]:
            write_json(OUT, {"machine": f"{platform.machine()}, {cores()} cores", "torch": TORCH_NOTE, **record})


def requirements() -> list[Requirement]:
    """Return the direct dependencies, those of the tests included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["test"]]]


def wanted(kind: str) -> list[str]:
    """Return what pip is asked for: the lower bound of everything, or nothing in particular; torch as it is locked."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    held = next(line for line in lines if line.startswith("torch=="))
    if kind == "newest":
        return [held]
    lowest = {r.name: next(s.version for s in r.specifier if s.operator == ">=") for r in requirements()}
    return [held, *(f"{name}=={version}" for name, version in lowest.items() if name != "torch")]


def make_environment(kind: str, folder: Path) -> str:
    """Install the project and its tests into a fresh environment; return its interpreter."""
    print(f"== {kind}: installing ==", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    python = str(folder.absolute() / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *BACKEND], check=True)
    subprocess.run([*install, "--no-build-isolation", "-e", f"{ROOT}[test]", *wanted(kind)], check=True)
    return python


def installed(python: str) -> dict[str, Any]:
    """Return the versions of the direct dependencies in an environment."""
    listing = subprocess.run([python, "-m", "pip", "list", "--format=json"], check=True, capture_output=True, text=True)
    found = {canonicalize_name(item["name"]): item["version"] for item in json.loads(listing.stdout)}
    version = subprocess.run([python, "--version"], check=True, capture_output=True, text=True).stdout.split()[-1]
    return {"python": version, "versions": {r.name: found[canonicalize_name(r.name)] for r in requirements()}}


def run_tests(python: str, tests: list[str], workers: int, results: Path) -> dict[str, Any]:
    """Run tests and return how many passed, and the names of those that did not."""
    warnings = [argument for rule in IGNORED for argument in ("-W", rule)]
    command = [python, "-m", "pytest", *tests, "--ignore=tests/test_lock.py", "-p", "no:cacheprovider", *warnings]
    command += ["-n", str(workers), "--dist", "loadfile", f"--junitxml={results.absolute()}"]
    start = time.monotonic()
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    cases = list(ET.parse(results).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "skipped": len(skipped),
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
        "minutes": round((time.monotonic() - start) / 60, 1),
    }


if __name__ == "__main__":
    main()
