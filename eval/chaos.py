"""Does a search lose or repeat anything, whoever dies? Kill its processes at random, compare with an undisturbed one.

    PYTHONPATH=. python eval/chaos.py --kills 100        # writes eval/results/chaos.json; --go-on: in pieces

Two drivers, each with two workers, work on one run directory. At random moments a driver or a worker is killed
(SIGKILL) or a worker is stopped for good (SIGSTOP: it hangs), and what was killed is started again; temporary files
torn by kills stay. When the number of kills is reached the drivers end in peace. Labels, chosen configurations and
recipe must be those of an undisturbed run; trials that had a label must keep it, file by file.
"""

import argparse
import datetime
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from quantdm.files import read_json, write_json
from quantdm.machine import versions
from tests.tiny_search import TRIALS

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "eval" / "results" / "chaos.json"
PAUSE = (1.0, 8.0)  # seconds between two kills
WEIGHTS = {"driver": 1, "worker": 3, "stopped worker": 2}  # drivers are killed less often: they take long to start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--go-on", action="store_true", help="add to the rounds that are recorded")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        quiet = Path(folder) / "quiet"
        _finish(_start(quiet))
        rounds = read_json(OUT, version=1)["rounds"] if given.go_on and OUT.is_file() else []
        new = 0
        while new < given.kills:
            record = _disturbed(Path(folder) / f"round{len(rounds)}", quiet, given.kills - new, len(rounds))
            new += sum(record["kills"].values())
            rounds.append(record)
            print(record, flush=True)
            kills = sum(sum(record["kills"].values()) for record in rounds)
            result = {"version": 1, "rounds": rounds, "kills": kills, "machine": platform.processor()}
            result |= {"versions": versions(), "date": datetime.date.today().isoformat()}
            write_json(OUT, result)
    if not all(record["same_labels"] and record["same_recipe"] and not record["changed"] for record in rounds):
        sys.exit("a label was lost, repeated or changed")


def _disturbed(folder: Path, quiet: Path, most: int, seed: int) -> dict:
    """Run one search under fire until it is finished; return what was killed and whether anything differs."""
    chance, kills = random.Random(seed), dict.fromkeys(WEIGHTS, 0)
    drivers = [_start(folder), _start(folder)]
    seen: dict[str, int] = {}
    changed: list[str] = []
    while any(driver.poll() is None for driver in drivers):
        time.sleep(chance.uniform(*PAUSE))
        for path in (folder / "trials").glob("*.json"):
            stamp = path.stat().st_mtime_ns
            if seen.setdefault(path.name, stamp) != stamp:
                changed.append(path.name)
        running = [i for i, driver in enumerate(drivers) if driver.poll() is None]
        if sum(kills.values()) >= most or not running:
            continue
        place = chance.choice(running)
        workers, kind = _children(drivers[place].pid), chance.choices([*WEIGHTS], [*WEIGHTS.values()])[0]
        if kind == "driver":
            drivers[place].kill()
            drivers[place].wait()
            drivers[place] = _start(folder)
        elif workers:
            os.kill(chance.choice(workers), signal.SIGKILL if kind == "worker" else signal.SIGSTOP)
        else:
            continue
        kills[kind] += 1
    codes = [driver.wait() for driver in drivers]
    if any(codes):  # the last word is a quiet run, as a user would give it
        _finish(_start(folder))
    return {
        "kills": kills,
        "changed": sorted(set(changed)),
        "same_labels": _labels(folder) == _labels(quiet),
        "same_recipe": (folder / "recipe.yaml").read_text() == (quiet / "recipe.yaml").read_text(),
        "exit_codes": codes,
    }


def _labels(folder: Path) -> dict[str, float]:
    found = {path.stem: read_json(path)["fid_fp"] for path in (folder / "trials").glob("*.json")}
    assert len(found) == TRIALS, len(found)
    return found


def _start(folder: Path) -> "subprocess.Popen[bytes]":
    code = (
        "import quantdm.runs.engines.local as local; local.LEAST_PATIENCE = local.OPENING = 30.0; "
        f"from tests.tiny_search import run_search; run_search({str(folder)!r}, workers=2)"
    )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)


def _finish(process: "subprocess.Popen[bytes]") -> None:
    if process.wait():
        sys.exit(f"the search ended with {process.returncode}")


def _children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(line) for line in found.split()]


if __name__ == "__main__":
    main()
