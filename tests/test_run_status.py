"""How far a run is, and trials that move between machines."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from quantdm import get_denoiser, load_pipeline
from quantdm.cli.main import app
from quantdm.errors import QuantDMError
from quantdm.runs.bundle import export_trials, import_trials
from quantdm.runs.claims import Claims
from quantdm.runs.failure import last_failure, told_why
from quantdm.runs.jobs import CLAIMS
from quantdm.runs.run import Run
from quantdm.runs.status import status_of
from quantdm.runs.store import TrialStore
from tests.tiny_search import run_search


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
    assert "trials: 20 of 30 planned, 20.0 a minute, 30 s left" in shown.output
    assert f"process {os.getpid()}" in shown.output
    assert max(map(len, shown.output.splitlines())) <= 80
    record = json.loads(CliRunner().invoke(app, ["status", str(copied.folder), "--json"]).output)
    assert record["trials"] == 20


def test_a_run_at_work_where_nothing_is_claimed_says_when_it_last_wrote_and_one_without_a_recipe_how_to_go_on(
    copied: Run,
) -> None:
    copied.path("recipe.yaml").unlink()
    for path in (copied.folder, *copied.folder.rglob("*")):
        os.utime(path, (time.time() - 3600, time.time() - 3600))
    copied.path("bank/new").write_text("")
    shown = CliRunner().invoke(app, ["status", str(copied.folder)]).output
    assert "nobody" not in shown
    assert "being measured; last file 0 s ago" in shown
    refused = CliRunner().invoke(app, ["tune", "--run-dir", str(copied.folder)]).exception
    assert "this run has not chosen a recipe yet; run the command that started it again" in str(refused)


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


def test_a_run_that_failed_before_its_bank_says_why_until_it_goes_on(tmp_path: Path) -> None:
    pipe = load_pipeline("digits-dit")
    with torch.no_grad():
        next(iter(get_denoiser(pipe).parameters())).fill_(float("nan"))
    with pytest.raises(QuantDMError) as error:
        run_search(tmp_path / "run", pipe=pipe)
    found = status_of(tmp_path / "run")
    assert found.stopped is not None
    assert found.stopped.reason == str(error.value)
    assert not found.stages["bank"]  # its folder may be there
    shown = CliRunner().invoke(app, ["status", str(tmp_path / "run")]).output
    assert "stopped 0 s ago: " in shown
    assert " ".join(str(error.value).split())[:60] in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 80
    record = json.loads(CliRunner().invoke(app, ["status", str(tmp_path / "run"), "--json"]).output)
    assert record["stopped"]["reason"] == str(error.value)
    with told_why(tmp_path / "run"):
        assert status_of(tmp_path / "run").stopped is None
    assert status_of(tmp_path / "run").stopped is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (ZeroDivisionError("division\nby zero"), "ZeroDivisionError: division by zero"),
        (QuantDMError("x" * 1000), "x" * 497 + "..."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_stops_a_run_is_one_line(error: BaseException, reason: str, tmp_path: Path) -> None:
    with pytest.raises(type(error)), told_why(tmp_path):
        raise error
    stopped = last_failure(tmp_path)
    assert stopped is not None
    assert stopped.reason == reason
    gone = tmp_path / "gone" / "deeper"
    gone.parent.write_text("a file")
    with pytest.raises(type(error)), told_why(gone):  # nothing can be written there: the error is what is told
        raise error
