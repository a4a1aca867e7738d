"""Many processes and one store: every job is measured once, nothing is lost, whoever dies."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from quantdm.errors import QuantDMError
from quantdm.metrics.samples import Draw
from quantdm.runs.claims import Claims, _space
from quantdm.runs.evaluator import Job
from quantdm.runs.jobs import CLAIMS, measure_jobs
from quantdm.runs.store import TrialStore
from tests.programs import ROOT, environment


class Bar:
    """Counts what a progress bar is told."""

    def __init__(self) -> None:
        self.n = 0

    def update(self, n: int = 1) -> None:
        """Count."""
        self.n += n


class Measurer:
    """An engine whose figures are a function of the job, slow enough to be interrupted."""

    def __init__(self, log: Path, seconds: float = 0.01) -> None:
        self.log, self.seconds = log, seconds

    def map(self, method: str, arguments, *, at_most: int | None = None, until=None):
        """Measure one after the other and note what was measured."""
        for index, argument in enumerate(arguments):
            if method == "measure":
                time.sleep(self.seconds * random.random() * 2)
                with self.log.open("a") as file:
                    file.write(argument.key + "\n")
                yield index, {"fid_fp": argument.draw.base_seed / 7}
            else:
                yield index, None


def make_jobs(count: int) -> dict[str, Job]:
    """Return jobs with distinct keys."""
    jobs = [Job(Draw(base, 4, 2), {"layer": None}) for base in range(count)]
    return {job.key: job for job in jobs}


def run_driver(folder: str, count: int, lease: float) -> None:
    """Measure all jobs as one of several drivers; started as a program of its own."""
    store, jobs = TrialStore(Path(folder) / "trials"), make_jobs(count)
    engine = Measurer(Path(folder) / f"log-{os.getpid()}")
    measure_jobs(engine, store, jobs, progress=Bar(), claims=Claims(store.folder / CLAIMS, lease=lease))  # type: ignore[arg-type]


def start_driver(folder: Path, count: int, lease: float = 2.0) -> "subprocess.Popen[bytes]":
    """Start a driver as a process."""
    code = f"from tests.test_claims import run_driver; run_driver({str(folder)!r}, {count}, {lease})"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment())


def test_a_claim_is_held_by_one_and_given_back(tmp_path: Path) -> None:
    with Claims(tmp_path) as ours, Claims(tmp_path) as theirs:
        assert ours.take("a")
        assert not theirs.take("a")
        assert theirs.take("b")
        assert {claim.key: claim.pid for claim in ours.holders()} == {"a": os.getpid(), "b": os.getpid()}
        ours.release("a")
        assert theirs.take("a")
    assert not list(tmp_path.iterdir())


def test_a_claim_without_a_sign_of_life_is_taken_over_by_exactly_one(tmp_path: Path) -> None:
    for number in range(20):
        path = tmp_path / f"job{number}"
        path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "x"}))
        os.utime(path, (time.time() - 100, time.time() - 100))
        takers = [Claims(tmp_path, lease=50) for _ in range(8)]
        won: list[int] = []
        start = threading.Barrier(len(takers))

        def take(index: int, number: int = number, takers=takers, won=won, start=start) -> None:
            start.wait()
            if takers[index].take(f"job{number}"):
                won.append(index)

        threads = [threading.Thread(target=take, args=(index,)) for index in range(len(takers))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
    young = tmp_path / "young"
    young.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "x"}))
    assert not Claims(tmp_path, lease=50).take("young")


def test_a_holder_shows_signs_of_life_and_a_dead_process_of_this_machine_none(tmp_path: Path) -> None:
    with Claims(tmp_path, lease=0.6) as ours:
        assert ours.take("a")
        time.sleep(1.0)
        holder = ours.holder("a")
        assert holder is not None
        assert holder.age < 0.6
        assert not Claims(tmp_path, lease=0.6).take("a")
    dead = {"host": socket.gethostname(), "space": _space(), "pid": 2**22 - 1, "started": "1"}
    (tmp_path / "b").write_text(json.dumps(dead))
    (tmp_path / "c").write_text(json.dumps(dead | {"space": "another container"}))
    assert Claims(tmp_path).take("b")
    assert not Claims(tmp_path).take("c")


def test_two_drivers_share_the_work_and_both_get_everything(tmp_path: Path) -> None:
    jobs, store = make_jobs(60), TrialStore(tmp_path / "trials")
    found: list[dict] = []
    bars = [Bar(), Bar()]

    def drive(number: int) -> None:
        engine = Measurer(tmp_path / f"log-{number}")
        found.append(measure_jobs(engine, store, jobs, progress=bars[number]))  # type: ignore[arg-type]

    threads = [threading.Thread(target=drive, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {key: {"fid_fp": job.draw.base_seed / 7} for key, job in jobs.items()}
    assert found == [expected, expected]
    measured = [(tmp_path / f"log-{number}").read_text().split() for number in range(2)]
    assert sorted(measured[0] + measured[1]) == sorted(jobs)  # each once
    assert all(len(share) > 10 for share in measured)
    assert [bar.n for bar in bars] == [60, 60]


def test_a_driver_that_is_killed_loses_nothing_and_changes_no_label(tmp_path: Path) -> None:
    jobs, store = make_jobs(80), TrialStore(tmp_path / "trials")
    chance = random.Random(0)
    running = [start_driver(tmp_path, len(jobs)) for _ in range(2)]
    log = running[0]
    while not (tmp_path / f"log-{log.pid}").is_file():  # until it has measured something
        assert log.poll() is None
        time.sleep(0.05)
    time.sleep(0.2 + 0.3 * chance.random())
    os.kill(log.pid, signal.SIGKILL)
    log.wait()
    running[0] = start_driver(tmp_path, len(jobs))
    for process in running:
        assert process.wait(60) == 0
    assert {key: store.get(key) for key in jobs} == {k: {"fid_fp": j.draw.base_seed / 7} for k, j in jobs.items()}
    assert all(store.get(path.name) for path in (tmp_path / "trials" / CLAIMS).iterdir())  # left behind, and harmless


def test_what_a_killed_process_left_half_written_is_swept_once_it_is_old(tmp_path: Path) -> None:
    store, jobs = TrialStore(tmp_path / "trials"), make_jobs(2)
    store.folder.mkdir()
    old, young = (store.folder / f".{name}.json.x.tmp" for name in ("old", "young"))
    for path in (old, young):
        path.write_text("{")
    os.utime(old, (time.time() - 100, time.time() - 100))
    measure_jobs(Measurer(tmp_path / "log"), store, jobs, progress=Bar())  # type: ignore[arg-type]
    assert young.exists()
    assert not old.exists()


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    claims = Claims(tmp_path / "gone")
    with pytest.raises(QuantDMError, match="cannot be written"):
        claims.take("a")
