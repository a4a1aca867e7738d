"""Does a search lose or repeat anything, whoever dies? Kill its processes at random, compare with an undisturbed one.

    PYTHONPATH=. python eval/chaos.py --kills 100        # writes eval/results/chaos.json; --go-on: in pieces
    PYTHONPATH=. python eval/chaos.py --engine ray --kills 30 --go-on

Two drivers, each with two workers, work on one run directory. What is hit next is drawn first (a driver or a worker is
killed, a worker is stopped for good: it hangs), then one is waited for, and hit at a random moment of its life; drivers
are started again, and temporary files torn by kills stay. On Ray there are one driver and a cluster of three nodes on
this machine, and whole nodes are lost too, each replaced by a new one. When the number of kills is reached the drivers
end in peace. Labels, chosen configurations and recipe must be those of an undisturbed run of the local engine; trials
that had a label must keep it, file by file.
"""

import argparse
import contextlib
import datetime
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import psutil

from quantdm.files import read_json, write_json
from quantdm.machine import cores, versions
from tests.tiny_search import TRIALS

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "eval" / "results" / "chaos.json"
DELAY = (0.0, 8.0)  # seconds from when there is a victim to the hit
LOOK = 0.2  # seconds between two looks for one
WEIGHTS = {
    "local": {"driver": 1, "worker": 3, "stopped worker": 2},
    "ray": {"driver": 1, "worker": 2, "stopped worker": 1, "node": 2},
}
WORKERS = {"local": "quantdm.runs.engines.worker", "ray": "ray::RemoteWorker"}  # in their command lines
OPENING, PATIENCE = 120.0, 30.0  # seconds after which a worker that opens its pipeline, or is at a job, counts as hung


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--engine", choices=[*WEIGHTS], default="local")
    parser.add_argument("--go-on", action="store_true", help="add to the rounds that are recorded")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        quiet = Path(folder) / "quiet"
        _finish(_start(quiet))
        rounds = read_json(OUT, version=1)["rounds"] if given.go_on and OUT.is_file() else []
        new = 0
        while new < given.kills:
            record = _round(given.engine, Path(folder) / f"round{len(rounds)}", quiet, given.kills - new, len(rounds))
            new += sum(record["kills"].values())
            rounds.append(record)
            print(record, flush=True)
            kills = sum(sum(record["kills"].values()) for record in rounds)
            write_json(OUT, {"version": 1, "rounds": rounds, "kills": kills})
    if not all(record["same_labels"] and record["same_recipe"] and not record["changed"] for record in rounds):
        sys.exit("a label was lost, repeated or changed")


def _round(engine: str, folder: Path, quiet: Path, most: int, seed: int) -> dict[str, Any]:
    """Run one search under fire until it is finished; return what was killed and whether anything differs."""
    if engine == "local":
        fire = Fire(folder, 2, "local", random.Random(seed))
        codes = fire.burn(most)
    else:
        with _Nodes() as nodes:
            fire = Fire(folder, 1, "ray", random.Random(seed), nodes.address, nodes.lose_one)
            codes = fire.burn(most)
    if any(codes):  # the last word is a quiet run, as a user would give it
        _finish(_start(folder))
    return {
        "engine": engine,
        "kills": fire.kills,
        "changed": sorted(fire.changed),
        "same_labels": _labels(folder) == _labels(quiet),
        "same_recipe": (folder / "recipe.yaml").read_text() == (quiet / "recipe.yaml").read_text(),
        "exit_codes": codes,
        "last_words": [words for code, words in zip(codes, fire.last_words(), strict=True) if code],
        "machine": f"{platform.machine()}, {cores()} cores",
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }


class Fire:
    """Drivers that search in one folder, and what befalls them.

    Args:
        folder: the run directory.
        drivers: how many search at once.
        engine: of every driver.
        chance: which kind is hit next, which of it, and when.
        address: of the Ray cluster.
        lose_node: loses one of its nodes.
    """

    def __init__(
        self,
        folder: Path,
        drivers: int,
        engine: str,
        chance: random.Random,
        address: str | None = None,
        lose_node: Callable[[random.Random], None] | None = None,
    ) -> None:
        self.folder, self.engine, self.chance, self.address, self.lose_node = folder, engine, chance, address, lose_node
        self.kills = dict.fromkeys(WEIGHTS[engine], 0)
        self.changed: set[str] = set()
        self._seen: dict[str, int] = {}
        self._stopped: list[psutil.Process] = []
        self._drivers = [self._start(place) for place in range(drivers)]

    def burn(self, most: int) -> list[int]:
        """Hit at most so often; return the drivers' exit codes."""
        weights = WEIGHTS[self.engine]
        while sum(self.kills.values()) < most and self._running():
            kind = self.chance.choices([*weights], [*weights.values()])[0]
            delay, there_since = self.chance.uniform(*DELAY), None
            while self._running():
                time.sleep(LOOK)
                self._look_for_changes()
                if there_since is None and self._victims(kind):
                    there_since = time.monotonic()
                if there_since is not None and time.monotonic() - there_since >= delay:
                    self.kills[kind] += self._hit(kind)
                    break
        codes = [driver.wait() for driver in self._drivers]
        self._look_for_changes()
        for process in self._stopped:  # those whose driver was killed before it missed them
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return codes

    def last_words(self) -> list[str]:
        """Return the last line that every driver wrote to its standard error."""
        said = [self._said(place).read_text().strip().splitlines() for place in range(len(self._drivers))]
        return [lines[-1] if lines else "" for lines in said]

    def _said(self, place: int) -> Path:
        return self.folder.with_name(f"{self.folder.name}-{place}.err")

    def _start(self, place: int) -> "subprocess.Popen[bytes]":
        with self._said(place).open("wb") as said:
            return _start(self.folder, self.engine, self.address, said)

    def _running(self) -> list[int]:
        return [place for place, driver in enumerate(self._drivers) if driver.poll() is None]

    def _victims(self, kind: str) -> list[Any]:
        """Return places of drivers, processes of workers, or whether there is a node to lose."""
        if kind == "driver":
            return [*self._running()]
        if kind == "node":
            return [True] if _processes(WORKERS["ray"]) else []  # a node without a worker is no loss
        return [p for p in _processes(WORKERS[self.engine]) if p.status() != psutil.STATUS_STOPPED]

    def _hit(self, kind: str) -> bool:
        """Hit one of a kind; return whether one was still there."""
        try:
            victims = self._victims(kind)
            if not victims:
                return False
            victim = self.chance.choice(victims)
            if kind == "driver":
                self._drivers[victim].kill()
                self._drivers[victim].wait()
                self._drivers[victim] = self._start(victim)
            elif kind == "node":
                assert self.lose_node is not None
                self.lose_node(self.chance)
            elif kind == "worker":
                victim.kill()
            else:
                victim.suspend()
                self._stopped.append(victim)
        except psutil.NoSuchProcess:
            return False
        return True

    def _look_for_changes(self) -> None:
        """Note trials whose file is another than when it was first seen."""
        for path in (self.folder / "trials").glob("*.json"):
            stamp = path.stat().st_mtime_ns
            if self._seen.setdefault(path.name, stamp) != stamp:
                self.changed.add(path.name)


class _Nodes:
    """A Ray cluster on this machine: a head without work, and three nodes with one core each, one always to be lost."""

    def __enter__(self) -> "_Nodes":
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self._nodes = [self._cluster.add_node(num_cpus=1) for _ in range(3)]
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()

    @property
    def address(self) -> str:
        """Where drivers connect."""
        return str(self._cluster.address)

    def lose_one(self, chance: random.Random) -> None:
        """Lose a node without a word, and add a new one."""
        self._cluster.remove_node(self._nodes.pop(chance.randrange(len(self._nodes))), allow_graceful=False)
        self._nodes.append(self._cluster.add_node(num_cpus=1))


def _processes(command: str) -> list[psutil.Process]:
    """Return the processes of this machine's user that descend from this one and have this in their command line."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if command in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def _labels(folder: Path) -> dict[str, float]:
    found = {path.stem: read_json(path)["fid_fp"] for path in (folder / "trials").glob("*.json")}
    assert len(found) == TRIALS, len(found)
    return found


def _start(
    folder: Path, engine: str = "local", address: str | None = None, stderr: IO[bytes] | int = subprocess.DEVNULL
) -> "subprocess.Popen[bytes]":
    code = (
        f"import quantdm.runs.engines.local as local; local.LEAST_PATIENCE, local.OPENING = {PATIENCE}, {OPENING}; "
        f"from tests.tiny_search import run_search; run_search({str(folder)!r}, workers=2, engine={engine!r}, "
        f"ray_address={address!r})"
    )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=stderr)


def _finish(process: "subprocess.Popen[bytes]") -> None:
    if process.wait():
        sys.exit(f"the search ended with {process.returncode}")


if __name__ == "__main__":
    main()
