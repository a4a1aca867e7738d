"""A full disk, a folder that is lost, a torn file, NaN from a worker, a clock that jumps: no label is lost or wrong."""

import contextlib
import json
import resource
import signal
import time
from types import SimpleNamespace

import pytest

from quantdm import QuantDMError
from quantdm.metrics.samples import Draw
from quantdm.runs.claims import CLAIMS, Claims
from quantdm.runs.evaluator import Job
from quantdm.runs.jobs import measure_jobs
from quantdm.runs.store import TrialStore

JOBS = {job.key: job for job in (Job(Draw(0, 2, 1), {"layer": f"uniform-channel-{b}"}) for b in range(2, 8))}


class Planted:
    """An engine that measures at once; `broken` says which result is NaN, `between` is called after each."""

    def __init__(self, broken=None, between=lambda count: None):
        self.measured, self.broken, self.between = [], broken, between

    def map(self, method, arguments, *, at_most=None, until=None):
        for index, job in enumerate(arguments):
            if method != "prepare":
                self.measured.append(job.key)
                value = float("nan") if index == self.broken else float(job.labels["layer"][-1])
                yield index, {"fid_fp": value}
                self.between(index)


def measured(folder, engine, **settings):
    silent = SimpleNamespace(update=lambda: None)  # a bar would write to a file of pytest's, which may not grow either
    return measure_jobs(engine, TrialStore(folder), JOBS, progress=silent, **settings)


def check_goes_on(folder, engine):
    """Go on with another engine: all labels are right, none that was kept is measured again, nothing lies about."""
    kept = {path.stem for path in folder.glob("*.json")}
    after = Planted()
    found = measured(folder, after)
    assert {key: record["fid_fp"] for key, record in found.items()} == {
        key: float(job.labels["layer"][-1]) for key, job in JOBS.items()
    }
    assert set(after.measured) == set(JOBS) - kept
    assert [p.name for p in folder.iterdir() if p.suffix != ".json" and p.name != CLAIMS] == []
    assert not Claims(folder / CLAIMS).holders()


@contextlib.contextmanager
def full_disk(room):
    """Let no file of this process grow beyond `room` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(tmp_path):
    folder, engine = tmp_path / "trials", Planted()
    store = TrialStore(folder)
    first = next(iter(JOBS))
    store.put(first, {"fid_fp": 2.0})
    with full_disk(40), pytest.raises(QuantDMError, match=r"cannot be written .*make room"):
        measured(folder, engine)
    assert [path.stem for path in folder.glob("*.json")] == [first]
    check_goes_on(folder, engine)


def test_a_folder_in_whose_place_is_a_file_is_one_clear_error(tmp_path):
    (tmp_path / "trials").write_text("mine")
    with pytest.raises(QuantDMError, match="trials"):
        measured(tmp_path / "trials", Planted())
    assert (tmp_path / "trials").read_text() == "mine"


def test_a_torn_file_is_named_and_measured_again_once_it_is_gone(tmp_path):
    folder = tmp_path / "trials"
    measured(folder, Planted())
    torn = next(folder.glob("*.json"))
    torn.write_text(torn.read_text()[:30])
    with pytest.raises(QuantDMError, match=torn.name):
        measured(folder, Planted())
    torn.unlink()
    check_goes_on(folder, Planted())


def test_a_record_without_content_as_a_power_cut_leaves_it_is_measured_again(tmp_path):
    measured(tmp_path / "trials", Planted())
    torn = sorted((tmp_path / "trials").glob("*.json"))[2]
    torn.write_bytes(b"")
    assert len(list(TrialStore(tmp_path / "trials"))) == len(JOBS) - 1
    check_goes_on_after(tmp_path / "trials", {torn.stem})


def check_goes_on_after(folder, lost):
    after = Planted()
    measured(folder, after)
    assert set(after.measured) == lost
    assert {trial["key"] for trial in TrialStore(folder)} == set(JOBS)


def test_of_two_records_of_one_key_the_first_counts_for_everybody(tmp_path):
    store = TrialStore(tmp_path / "trials")
    store.put("a" * 16, {"fid_fp": 1.0})
    store.put("a" * 16, {"fid_fp": 1.0 + 1e-7})
    assert store.get("a" * 16) == {"fid_fp": 1.0}
    assert [path.name for path in store.folder.iterdir()] == [f"{'a' * 16}.json"]


def test_nan_from_a_worker_is_no_label(tmp_path):
    folder, engine = tmp_path / "trials", Planted(broken=3)
    with pytest.raises(QuantDMError, match="measured fid_fp = nan"):
        measured(folder, engine)
    assert len(list(folder.glob("*.json"))) == 3
    check_goes_on(folder, engine)


@pytest.mark.parametrize("jump", [-1e6, 1e6], ids=["back", "ahead"])
def test_a_clock_that_jumps_takes_no_claim_from_who_works(tmp_path, monkeypatch, jump):
    folder, real = tmp_path / "trials", time.time
    others = []

    def between(count):
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        others.append(Claims(folder / CLAIMS).living())

    claims = Claims(folder / CLAIMS)
    with claims:
        assert claims.take("mine")
        found = measured(folder, Planted(between=between))
        assert all("mine" in [claim.key for claim in living] for living in others)
        assert not Claims(folder / CLAIMS).take("mine")
    assert len(found) == len(JOBS)
    assert len(json.loads(next(folder.glob("*.json")).read_text())) == 3
