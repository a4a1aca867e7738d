"""The trial store: what is listed is what lies there, whatever happened to the folder meanwhile."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from quantdm.errors import QuantDMError
from quantdm.files import digest
from quantdm.metrics.samples import Draw
from quantdm.runs.evaluator import Job
from quantdm.runs.store import TrialStore

KEYS = [f"{number:016x}" for number in range(40)]


def filled(folder: Path) -> TrialStore:
    """Return a store with a record per key."""
    store = TrialStore(folder)
    for number, key in enumerate(KEYS):
        store.put(key, {"fid_fp": number / 7, "config": {"layer": None, "\u00e4": "uniform-4"}})
    return store


def one_by_one(store: TrialStore) -> list[dict]:
    """Return what the files hold, read by plain means."""
    paths = sorted(path for path in store.folder.glob("*.json") if path.stat().st_size)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return [{key: value for key, value in record.items() if key != "version"} for record in found]


def test_a_listing_is_what_lies_there_after_every_change_by_anybody(tmp_path):
    store = filled(tmp_path)
    assert list(store) == one_by_one(store)
    assert len(list(store)) == len(KEYS)
    store.path(KEYS[3]).unlink()  # deleted
    store.path(KEYS[5]).write_bytes(b"")  # left empty by a power cut
    replaced = {"version": 1, "key": KEYS[7], "fid_fp": 5.0, "config": {}}
    store.path(KEYS[7]).write_text(json.dumps(replaced))  # without indents, as another hand writes it
    (tmp_path / f".{KEYS[9]}.json.0123.tmp").write_text("{")  # half-written
    (tmp_path / ".claims").mkdir()
    assert list(store) == one_by_one(store)
    assert len(list(store)) == len(KEYS) - 2
    assert store.get(KEYS[7]) == {"fid_fp": 5.0, "config": {}}
    assert store.get(KEYS[5]) is None
    store.put(KEYS[5], {"fid_fp": 1.5})  # takes the place of what is empty, and of nothing else
    store.put(KEYS[7], {"fid_fp": 6.0})
    assert store.get(KEYS[5]) == {"fid_fp": 1.5}
    assert store.get(KEYS[7]) == {"fid_fp": 5.0, "config": {}}
    assert list(store) == one_by_one(store)
    assert list(TrialStore(tmp_path / "nowhere")) == []


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b'{"version": 1, "key": ', "not a JSON file"),
        (b"\xff\xfe", "not a JSON file"),
        (b'{"version": 2, "key": "%s"}' % KEYS[0].encode(), "got version 2, expected 1"),
        (b"[1]", "got version list, expected 1"),
        (b'{"version": 1, "key": "other"}', "holds trial other"),
    ],
)
def test_what_is_no_record_of_its_key_is_refused_by_name(tmp_path, content, error):
    store = filled(tmp_path)
    store.path(KEYS[0]).write_bytes(content)
    with pytest.raises(QuantDMError, match=error) as told:
        list(store)
    assert KEYS[0] in str(told.value)


@pytest.mark.parametrize(
    "job",
    [
        Job(Draw(1, 2, 3)),
        Job(Draw(1, 2, 3), {"b": None, "a": "uniform-4"}, {"bits": 6, "layers": {"x": "token-8"}}, "c", "t", "e"),
        Job(Draw(1, 2, 3), {"a": "kmeans-4"}, embeddings={"table": "uniform-channel-8"}),
    ],
)
def test_the_key_of_a_job_is_the_hash_of_its_whole_record(job):
    late = ("tuned", "embeddings", "parts")
    record = {key: value for key, value in asdict(job).items() if key not in late or value is not None}
    assert job.key == digest(record)
    assert Job.from_dict(asdict(job)).key == job.key
