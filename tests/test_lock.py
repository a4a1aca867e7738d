"""The lock pins the whole environment: what is installed, what pyproject asks for, what builds the package."""

import re
import sysconfig
import tomllib
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
PINS = {name: Version(version) for name, version in (line.split("==") for line in LINES)}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# of this environment: ray puts packages of its own on the path once it is imported
PLACES = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
# pip comes with Python itself and is no part of what runs
OWN = {"quantdm", "pip"}


def test_every_line_is_an_exact_pin_of_another_package():
    for line in LINES:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][\w.]*", line), line
    assert sorted(PINS) == [line.split("==")[0] for line in LINES]


def test_the_environment_is_the_locked_one():
    found = {canonicalize_name(d.metadata["Name"]): Version(d.version) for d in distributions(path=PLACES)}
    # 2.13.0+cpu is a build of 2.13.0
    other = {name: str(v) for name, v in found.items() - PINS.items() if Version(v.public) != PINS.get(name)}
    other = {name: version for name, version in other.items() if name not in OWN}
    assert not other, f"not what requirements.lock says: {other}; run `make clean`, then this again"


def test_the_lock_fits_what_pyproject_asks_for():
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"], *PROJECT["build-system"]["requires"]]
    for requirement in map(Requirement, wanted):
        pin = PINS.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement} is not in the lock; run `make lock`"
        assert requirement.specifier.contains(pin, prereleases=True), f"{requirement}, locked {pin}; run `make lock`"


def test_nothing_of_the_closure_is_left_out():
    for distribution in distributions(path=PLACES):
        for requirement in map(Requirement, distribution.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert canonicalize_name(requirement.name) in PINS, f"{distribution.name} needs {requirement}"
