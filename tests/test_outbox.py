"""What workers of a cluster fetch: files by content, once a node; what changed is refused; dead ones leave nothing."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quantdm.errors import QuantDMError
from quantdm.metrics.samples import Draw
from quantdm.runs.engines.call import Call
from quantdm.runs.engines.mirror import FILES, WORKERS, Mirror, Parcel, sweep
from quantdm.runs.engines.outbox import SPACE, Outbox
from quantdm.runs.evaluator import Job
from quantdm.runs.proposals import Proposal
from quantdm.runs.run import Run


class Shelf(list):
    """An object store: places are numbers."""

    def put(self, data):
        self.append(bytes(data) if isinstance(data, np.ndarray) else data)
        return len(self) - 1


@pytest.fixture
def outbox(tmp_path):
    pytest.importorskip("ray")
    run = Run(tmp_path / "run", None)  # its paths are all that is asked for
    for name, text in {"run.json": "{}", "bank/a": "A", "bank/b": "B", SPACE: "few options", "trials/t": "T"}.items():
        run.path(name).parent.mkdir(parents=True, exist_ok=True)
        run.path(name).write_text(text)
    shelf = Shelf()
    made = Outbox(run, shelf.put)
    made.look()
    return made, shelf, run


ASKED = Call("propose", Proposal("", (), (), 1, (), (), 0, 0))


def read(mirror):
    return {
        path.relative_to(mirror.folder).as_posix(): path.read_text()
        for path in mirror.folder.rglob("[!.]*")
        if path.is_file()
    }


def test_a_job_carries_one_place_and_files_travel_once(outbox, tmp_path):
    box, shelf, run = outbox
    first = box.parcel(Call("measure", Job(Draw(0, 2, 1), {})))[1]
    assert (len(first.listing), first.given, len(shelf)) == (1, {}, 4)  # three files and the listing
    box.look()
    assert box.parcel()[1] == Parcel(first.version, first.listing)
    assert len(shelf) == 4
    fetched = []
    workers = [Mirror(tmp_path / "node") for _ in range(2)]
    for worker in workers:
        worker.take(first, lambda place: (fetched.append(place), shelf[place])[1])
        assert read(worker) == {"run.json": "{}", "bank/a": "A", "bank/b": "B"}
    assert sorted(fetched) == [0, 1, 2, 3, 3]  # the second worker of a node finds what the first has fetched
    box.receive({"reference/r.safetensors": b"R"})
    assert run.path("reference/r.safetensors").read_bytes() == b"R"
    workers[1].take(box.parcel()[1], shelf.__getitem__)
    assert read(workers[1])["reference/r.safetensors"] == "R"


def test_a_space_that_grows_replaces_the_old_one_and_a_bank_that_changes_is_refused(outbox, tmp_path):
    box, shelf, run = outbox
    worker = Mirror(tmp_path / "node")
    worker.take(box.parcel(ASKED)[1], shelf.__getitem__)
    assert read(worker)[SPACE] == "few options"
    run.path(SPACE).write_text("more of them")
    box.look()
    worker.take(box.parcel(ASKED)[1], shelf.__getitem__)
    assert read(worker)[SPACE] == "more of them"
    run.path("bank/a").write_text("another A")
    box.look()
    for _ in range(2):  # the next job is refused for the same reason
        with pytest.raises(QuantDMError, match="bank/a: changed while the search was running"):
            worker.take(box.parcel()[1], shelf.__getitem__)


def test_files_that_a_job_names_travel_with_it(outbox, tmp_path):
    box, shelf, _ = outbox
    (tmp_path / "tuned.safetensors").write_text("W")
    record, parcel = box.parcel(Call("measure", Job(Draw(0, 2, 1), {}, tuned=str(tmp_path / "tuned.safetensors"))))
    worker = Mirror(tmp_path / "node")
    worker.take(parcel, shelf.__getitem__)
    assert (worker.folder / record["tuned"]).read_text() == "W"


def test_what_dead_workers_leave_is_removed_and_what_living_ones_have_stays(outbox, tmp_path):
    box, shelf, _ = outbox
    node = tmp_path / "node"
    living = Mirror(node)
    living.take(box.parcel()[1], shelf.__getitem__)
    code = (
        "import sys, time; from pathlib import Path; from quantdm.runs.engines.mirror import Mirror; "
        "mirror = Mirror(Path(sys.argv[1])); mirror._place('bank/c', 'hash', lambda: b'C'); "
        "print(mirror.folder, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(node)], stdout=subprocess.PIPE, text=True) as other:
        folder = Path(other.stdout.readline().strip())
        sweep(node)
        assert (folder / "bank/c").read_bytes() == b"C"
        other.kill()
        sweep(node, [folder.name])  # it waits for the process to be gone
    assert [path.name for path in (node / WORKERS).iterdir()] == [living.folder.name]
    assert len(list((node / FILES).iterdir())) == len(read(living)) == 3
