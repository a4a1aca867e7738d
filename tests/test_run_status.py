"""How far a run is, and trials that move between machines."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantdm.cli.main import app
from quantdm.errors import QuantDMError
from quantdm.runs.bundle import export_trials, import_trials
from quantdm.runs.claims import Claims
from quantdm.runs.jobs import CLAIMS
from quantdm.runs.run import Run
from quantdm.runs.status import status_of
from quantdm.runs.store import TrialStore


@pytest.fixture
def copied(finished, tmp_path: Path) -> Run:
    """Return a finished run that a test may change."""
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    return Run.open(tmp_path / "run")


def test_a_finished_run_has_its_stages_and_one_in_work_its_rate_and_who_works(copied: Run) -> None:
    found = status_of(copied.folder)
    assert found.stages["recipe"]
    assert (found.trials, found.planned, found.minutes_left) == (30, 30, None)
    store, now = copied.path("trials"), time.time()
    files = sorted(store.glob("*.json"))
    for path in files[20:]:
        path.unlink()
    for number, path in enumerate(files[:20]):
        os.utime(path, (now - 3 * number, now - 3 * number))  # one every three seconds
    with Claims(store / CLAIMS) as claims:
        assert claims.take(files[25].stem)
        assert claims.take(files[5].stem)  # finished already: left behind by one that was killed
        found = status_of(copied.folder)
        assert found.rate == pytest.approx(20)
        assert found.minutes_left == pytest.approx(0.5)
        assert [claim.key for claim in found.working["trials"]] == [files[25].stem]
        shown = CliRunner().invoke(app, ["status", str(copied.folder)])
    assert "trials: 20 of 30 planned, 20.0 a minute, 0 minutes left" in shown.output
    assert f"process {os.getpid()}" in shown.output
    assert max(map(len, shown.output.splitlines())) <= 80
    record = json.loads(CliRunner().invoke(app, ["status", str(copied.folder), "--json"]).output)
    assert record["trials"] == 20


def test_trials_leave_as_one_file_and_join_those_of_an_equal_run_only(copied: Run, tmp_path: Path) -> None:
    bundle, store = tmp_path / "trials.json", TrialStore(copied.path("trials"))
    before = {path.name: path.read_bytes() for path in store.folder.glob("*.json")}
    assert export_trials(copied, bundle) == 30
    for name in sorted(before)[:12]:
        (store.folder / name).unlink()
    assert import_trials(copied, bundle) == 12
    assert {path.name: path.read_bytes() for path in store.folder.glob("*.json")} == before
    assert import_trials(copied, bundle) == 0
    other = Run(copied.folder, copied.settings.model_copy(update={"label_steps": 9}))
    with pytest.raises(QuantDMError, match="another label steps"):
        import_trials(other, bundle)
    record = json.loads(bundle.read_text())
    record["trials"][0].pop("fid_fp")
    bundle.write_text(json.dumps(record))
    with pytest.raises(QuantDMError, match="without configuration or fid_fp"):
        import_trials(copied, bundle)
    shutil.rmtree(store.folder)
    with pytest.raises(QuantDMError, match="no finished trials"):
        export_trials(copied, tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()
