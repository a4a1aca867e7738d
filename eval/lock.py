"""Write requirements.lock, every package of the whole closure with its exact version: `make lock`.

It runs before the environment exists, so it needs Python and pip only.
"""

import json
import re
import subprocess
import sys
import tempfile
import venv
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
# What builds the package: `make` installs it first, so that building asks for nothing newer.
BACKEND = ("hatchling", "editables")
# torch is held back to the release that the tests run on; its CPU build satisfies the same pin as PyPI's.
HELD = ("torch==2.13.0",)
HEADER = """\
# Every package that `make demo` and `make test` install, runtime, tests and build backend, with its exact version.
# Written on {day} with Python {python} by `make lock`; do not edit. It serves as a constraint (pip install -c), so a
# machine takes the part that it needs: PyPI's torch asks for the nvidia packages and triton, its CPU build does not.
# No hashes: the two builds of torch have one version and different hashes, and both must install.
"""


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        print("== a fresh pip ==", flush=True)
        venv.create(Path(folder) / "venv", with_pip=True)
        pip = (str(Path(folder) / "venv" / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--isolated")
        run(*pip, "install", "--quiet", "--upgrade", "pip")  # reads what packages need without downloading them
        print("== resolving the closure (a minute) ==", flush=True)
        report = Path(folder) / "report.json"
        wanted = (*HELD, *BACKEND, f"{ROOT}[test]")
        # --isolated and PyPI alone: the lock must not depend on the settings of whoever makes it
        source = ("--index-url", "https://pypi.org/simple")
        run(*pip, "install", "--quiet", "--dry-run", "--ignore-installed", *source, "--report", str(report), *wanted)
        pins = pinned(json.loads(report.read_text()))
    header = HEADER.format(day=date.today(), python=sys.version.split()[0])
    LOCK.write_text(header + "".join(f"{name}=={version}\n" for name, version in pins))
    print(f"== {LOCK.name}: {len(pins)} packages ==")
    return 0


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def pinned(report: dict) -> list[tuple[str, str]]:
    """Return (normalized name, version) of everything in pip's report but the project itself."""
    found = [(item["metadata"]["name"], item["metadata"]["version"]) for item in report["install"]]
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}
    del pins["quantdm"]
    return sorted(pins.items())


if __name__ == "__main__":
    sys.exit(main())
