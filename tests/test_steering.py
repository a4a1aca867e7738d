"""Where a run works and how much at once: batches that memory holds, devices of workers, number formats."""

import shutil

import pytest
import torch
from typer.testing import CliRunner

from quantdm import QuantDMError, generate, load_pipeline, load_protocol, processes
from quantdm.cli.app import batch_size_of
from quantdm.cli.main import app
from quantdm.corridor import plan as planning
from quantdm.corridor.levels import level_of
from quantdm.corridor.run import run
from quantdm.machine import checked_device, same_devices
from quantdm.pipelines import subject as opening
from quantdm.pipelines.sizes import auto_batch, is_out_of_memory
from quantdm.pipelines.subject import look_at
from quantdm.runs.engines.local import Engine
from quantdm.runs.engines.means import Means, Speed
from quantdm.runs.run import Run
from quantdm.runs.search import start_run
from quantdm.runs.settings import Effort, make_settings
from quantdm.runs.stages import load_space
from quantdm.runs.trials import run_trials
from tests.tiny_search import EFFORT, OPTIONS, TRIALS

CPU_WORDS = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"


@pytest.fixture
def pipe():
    return load_pipeline("digits-dit")


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU_WORDS)], ids=str
)
def test_a_batch_that_memory_does_not_hold_is_halved_until_it_does_and_is_remembered(pipe, error):
    """The planted limit: the denoiser takes three images, which are six rows with guidance."""
    protocol, seen = load_protocol("digits-dit"), []
    whole = generate(pipe, protocol, range(7), steps=2)

    def limit(module, args, kwargs):
        seen.append(len(args[0]))
        if len(args[0]) > 6:
            raise error

    with pipe.transformer.register_forward_pre_hook(limit, with_kwargs=True):
        images = generate(pipe, protocol, range(7), steps=2)
        assert [rows for rows in seen if rows > 6] == [14]
        assert torch.allclose(images, whole, atol=1e-4)
        assert auto_batch(pipe, protocol) == 3
        generate(pipe, protocol, range(7), steps=2)
        generate(pipe, protocol, range(7), steps=2, batch_size=7)
        assert [rows for rows in seen if rows > 6] == [14]  # no later draw fails first


def test_one_image_that_does_not_fit_is_one_clear_error_and_other_errors_stay_themselves(pipe):
    def nothing(module, args, kwargs):
        raise MemoryError

    with (
        pipe.transformer.register_forward_pre_hook(nothing, with_kwargs=True),
        pytest.raises(QuantDMError, match="memory ran out on cpu with one image"),
    ):
        generate(pipe, load_protocol("digits-dit"), range(4), steps=1)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_workers_open_the_pipeline_each_on_its_own_device(finished, dit, monkeypatch):
    opened = Run.open(finished[0])
    with Engine(opened, look_at(dit), workers=2, devices=("cpu", "cpu:0"), batch_size=5) as engine:
        assert len(list(engine.map("prepare", iter(()), at_most=9))) == 0
        assert [process.args[-2:] for process in engine._processes] == [["cpu", "5"], ["cpu:0", "5"]]
    asked, real = [], opening.load_pipeline
    monkeypatch.setattr(
        opening, "load_pipeline", lambda *a, device, **k: asked.append(device) or real(*a, device="cpu", **k)
    )
    opened.open_subject(device="cuda:1")
    opened.open_subject()
    assert asked == ["cuda:1", "cpu"]
    assert same_devices(torch.device("cpu")) == ["cpu"]


def test_there_is_one_worker_per_accelerator_or_as_many_on_each_as_asked_for(finished, dit, monkeypatch):
    opened, subject = Run.open(finished[0]), look_at(dit)
    monkeypatch.setattr(type(subject), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    engine = Engine(opened, subject)
    assert (engine.workers, engine.devices) == (3, ("cuda:0", "cuda:1", "cuda:2"))
    shared = Engine(opened, subject, workers=4)
    assert (shared.workers, shared.accelerators) == (12, 3.0)  # GPU-hours count accelerators, not processes
    started = []
    monkeypatch.setattr(processes.subprocess, "Popen", lambda command, **_: started.append(command[-2]))
    for place in range(shared.workers):
        shared._start(place)
    assert sorted(started) == sorted([*engine.devices] * 4)


def test_a_number_format_is_kept_as_asked_for_and_bad_ones_are_one_clear_error(finished, dit):
    asked = {"target_bits": 3.2, "target_bytes": None, "trials": TRIALS, "seed": 0}
    settings = make_settings(look_at(dit), **asked, options=OPTIONS, effort=EFFORT, dtype="float16")
    assert settings.torch_dtype == torch.float16
    with pytest.raises(QuantDMError, match='dtype is "float32", asked for "float16"'):
        Run.create(finished[0], settings, keep_dtype=False)
    with pytest.raises(QuantDMError, match="dtype: got 'int4'"):
        make_settings(look_at(dit), **asked, options=OPTIONS, effort=EFFORT, dtype="int4")
    with pytest.raises(QuantDMError, match="device: got 'gpu9'"):
        checked_device("gpu9")
    assert (batch_size_of("auto"), batch_size_of("12"), checked_device("cpu")) == ("auto", 12, "cpu")
    for text in ("0", "-3", "many"):
        with pytest.raises(QuantDMError, match="batch size: got"):
            batch_size_of(text)


def test_a_dry_run_says_what_every_stage_takes_and_writes_nothing(tmp_path, dit):
    said = []
    found = run(
        dit, target_bits=3.2, run_dir=tmp_path / "run", options=OPTIONS, protocol=load_protocol("digits-dit"),
        workers=2, dry_run=True, say=said.append,
    )  # fmt: skip
    assert not (tmp_path / "run").exists()
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert [*stages][:3] == ["bank", "sensitivities", "trials"]
    assert all(stage["seconds"] > 0 and stage["memory"] > 8_000_000 and stage["disk"] > 0 for stage in found["stages"])
    assert 2 < stages["trials"]["seconds"] < 3600
    assert "An estimate" in said[-1]
    assert all(len(line) <= 79 for line in said[-1].splitlines())


def test_search_has_a_dry_run_as_well(tmp_path):
    words = ["search", "digits-dit", "--run-dir", str(tmp_path / "run"), "--target-bits", "3.2", "--effort", "quick"]
    found = CliRunner().invoke(app, [*words, "--workers", "1", "--dry-run"], catch_exceptions=False)
    assert found.exit_code == 0
    assert "sensitivities" in found.output
    assert "`search` ends with the verification" in found.output
    assert not (tmp_path / "run").exists()


def test_a_plan_says_days_as_days_and_that_the_machine_is_busy():
    stages = [planning.Stage("trials", seconds, 10**6, 10**6) for seconds in (100.0, 3000.0, 30_000.0, 300_000.0)]
    text = planning.Plan(tuple(stages), 30, 2, load=99.0).text()
    assert [line.split()[1:3] for line in text.splitlines()[1:5]] == [
        ["100", "s"], ["50", "min"], ["8", "h"], ["3", "days"],
    ]  # fmt: skip
    assert "is busy (load 99)" in text
    assert "is busy" not in planning.Plan(tuple(stages), 30, 2, load=1.0).text()


def test_a_plan_goes_by_the_workers_of_the_engine_and_by_fidelity_and_budget(dit, tmp_path):
    asked = {"target_bits": 3.2, "run_dir": tmp_path / "run", "options": OPTIONS, "dry_run": True, "workers": 1}
    asked |= {"protocol": load_protocol("digits-dit"), "trials": 40}
    with pytest.raises(QuantDMError, match="no accelerator works here"):
        run(dit, **asked, gpu_hours=1.0, say=lambda _: None)
    said = []
    run(dit, **asked, minutes=0.1, fidelity="auto", say=said.append)
    assert "time allows 0 of 40 trials" in said[-2]
    assert "if cheap labels rank like full ones" in said[-1]
    subject, level = look_at(dit), level_of("normal", trials=40)
    full, cheap = (
        make_settings(
            subject,
            target_bits=3.2,
            target_bytes=None,
            trials=40,
            seed=0,
            options=OPTIONS,
            fidelity=fidelity,
            effort=Effort(label_images=300, label_steps=8),  # of larger labels there is more to save
        )
        for fidelity in ("full", "auto")
    )
    slow, fast = Speed(1.0, 0.5), Speed(0.01, 0.005)

    def seconds(settings, means):
        plan = planning.plan_run(subject, settings, level, means, tuned=True)
        return {stage.name: stage.seconds for stage in plan.stages}

    here, there = (seconds(full, Means(workers, 64.0, slow, fast)) for workers in (1, 64))
    assert there["trials"] * 64 == pytest.approx(here["trials"])
    assert here["trials"] == 40 * full.label_images * full.label_steps * fast.fast  # measured by workers
    assert there["tuning"] == here["tuning"] > 1000 * there["sensitivities"]  # made by this process
    assert seconds(cheap, Means(64, 64.0, slow, fast))["trials"] < 0.5 * there["trials"]


def test_minutes_end_the_trials_in_time_for_what_follows_by_the_measured_rate(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(planning.time, "monotonic", lambda: now[0])
    stages = tuple(planning.Stage(name, s, 1, 1) for name, s in (("bank", 50), ("trials", 160), ("final rows", 100)))
    most = planning.Plan(stages, 160, 2).trials_within(200.0, said.append)
    assert most(0) == 100  # a second each by estimate, a hundred of two hundred seconds are for the rows
    now[0] = 40.0
    assert most(20) == 20 + 30  # they took two seconds each, sixty seconds are left
    assert "time allows 50 of 160" in said[-1]
    now[0] = 500.0
    assert most(60) == 60


def test_a_run_that_time_cut_short_goes_on_where_it_stopped(finished, dit, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    subject = look_at(dit)
    bigger = {"target_bits": 3.2, "trials": TRIALS + 6, "options": OPTIONS, "effort": EFFORT}
    grown, _ = start_run(subject, folder, **bigger)
    with Engine(grown, subject, workers=1) as engine:
        assert len(run_trials(grown, engine, load_space(grown), most=lambda done: 2)[0]) == TRIALS + 2
        assert len(run_trials(grown, engine, load_space(grown))[0]) == TRIALS + 6
    assert len(list((folder / "trials").glob("*.json"))) == TRIALS + 6
