"""What a run is asked for reaches every stage: batches, number format, metrics by name, rules for single tables."""

import json
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

import quantdm
from quantdm import (
    Protocol,
    QuantDMError,
    Recipe,
    apply_recipe,
    evaluate,
    generate,
    load_pipeline,
    load_protocol,
    load_recipe,
    look_at,
)
from quantdm.activations import usual_activations
from quantdm.cli import main as command_line
from quantdm.cli.main import app
from quantdm.correction.collect import collect_
from quantdm.correction.statistics import NoiseStatistics
from quantdm.corridor.export import export_run
from quantdm.hub.header import read_headers
from quantdm.metrics.chosen import check_chosen, chosen_figures
from quantdm.metrics.door import check_measures
from quantdm.metrics.features import load_extractor
from quantdm.metrics.intervals import frechet_infinity
from quantdm.metrics.kernels import kid
from quantdm.metrics.moments import Moments
from quantdm.metrics.neighbours import neighbour_figures
from quantdm.metrics.paired import ssim_each
from quantdm.metrics.registry import MORE, SIZES
from quantdm.metrics.samples import Draw, draw_samples, real_floor
from quantdm.pipelines.generate import as_bytes, calibration_calls
from quantdm.pipelines.protocol import known_protocols, protocol_schema
from quantdm.pipelines.stored import weight_files
from quantdm.runs.correct import correct_run
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import Evaluator, Job, Probe
from quantdm.runs.final import final_jobs
from quantdm.runs.labels import tables_of
from quantdm.runs.run import Run
from quantdm.runs.settings import Effort, make_settings
from quantdm.runs.stages import build_bank, describe, load_space
from quantdm.runs.tune import tune_run
from quantdm.schemes import Scheme
from quantdm.tuning import TuneSettings
from tests.pipeline_kinds import make

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = ROOT / "calib_data" / "protocol.schema.json"
CALIBRATED = Scheme.parse("uniform-channel-4-importance")
OPTIONS = [Scheme.parse("uniform-channel-3"), Scheme.parse("uniform-channel-8")]


@pytest.fixture
def tight():
    """A pipeline whose memory holds two images, and says so in the middle of a call."""
    pipe, calls = load_pipeline("digits-dit"), []

    def hold(_module, args, kwargs):
        images = len(args[0] if args else kwargs["hidden_states"]) // 2  # guided: each twice
        calls.append(images)
        if images > 2 and len(calls) > 1:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")

    pipe.transformer.register_forward_pre_hook(hold, with_kwargs=True)
    return pipe, calls


def test_a_call_that_ran_out_of_memory_is_not_recorded(tight):
    pipe, calls = tight
    protocol = load_protocol("digits-dit")
    recorded = calibration_calls(pipe, protocol, range(4), steps=3)
    assert calls[:2] == [4, 4]
    assert set(calls[2:]) == {2}
    assert len(recorded) == 2 * 3
    again = calibration_calls(pipe, protocol, range(4), steps=3)  # which knows what memory holds
    assert all(torch.equal(a.output, b.output) for a, b in zip(recorded, again, strict=True))


def test_nor_are_its_steps_taken_for_those_of_a_correction(tight):
    pipe, _ = tight
    protocol = load_protocol("digits-dit")
    collect_(NoiseStatistics(), pipe, lambda p: generate(p, protocol, range(4), steps=3, batch_size=4), nullcontext)


def test_the_trajectories_of_several_calls_do_not_run_into_each_other():
    pipe, protocol = load_pipeline("digits-dit"), load_protocol("digits-dit")
    found = []
    for batch_size in (4, 2):
        statistics = NoiseStatistics()
        made = partial(generate, protocol=protocol, seeds=range(4), steps=3, batch_size=batch_size)
        collect_(statistics, pipe, made, nullcontext)
        found.append(statistics)
    assert all(statistics._pairs.keys() == found[0]._pairs.keys() for statistics in found)
    assert len(found[0]._pairs) == 2  # of three steps


def test_the_batch_size_reaches_every_stage(tmp_path):
    pipe, protocol = make("ddpm")
    subject, largest = look_at(pipe), {}
    settings = make_settings(
        subject, target_bits=6.0, target_bytes=None, trials=30, seed=0, options=[CALIBRATED, OPTIONS[1]],
        protocol=protocol, effort=Effort(4, 2, 4, 5, 5, 0, 1),
    )  # fmt: skip
    run = Run.create(tmp_path / "run", settings)
    recipe = Recipe(model="ddpm", default=CALIBRATED.label)
    stage = ""

    def see(_module, args):
        largest[stage] = max(largest.get(stage, 0), len(args[0]))

    pipe.unet.register_forward_pre_hook(see)
    with Engine(run, subject, workers=1, batch_size=2) as engine:
        describe(run, subject)
        stage = "bank"
        build_bank(run, subject, batch_size=engine.batch_size)
        stage = "sensitivities"
        engine.local.sensitivity(Probe("conv_in", settings.options))
        stage = "tuning"
        tune_run(run, engine, recipe, TuneSettings(steps=1, rows=1, every=1), images=5)
        stage = "correction"
        correct_run(run, engine, recipe, None, images=6)
    assert largest == dict.fromkeys(("bank", "sensitivities", "tuning", "correction"), 2)


def test_a_pipeline_is_opened_in_the_format_that_is_asked_for_if_that_loses_nothing(tmp_path):
    assert look_at("digits-dit").dtype == torch.float32
    assert look_at("digits-dit", dtype="float16").dtype == torch.float16
    assert look_at("digits-dit", dtype="bfloat16").dtype == torch.float32  # it is stored in float16
    load_pipeline("digits-dit").save_pretrained(tmp_path / "wide")
    assert look_at(tmp_path / "wide", dtype="float16").dtype == torch.float32
    with pytest.raises(QuantDMError, match="dtype: got 'int8'"):
        CliRunner().invoke(app, ["run", "digits-dit", "--target-bits", "3", "--dtype", "int8"], catch_exceptions=False)


# -------------------------------------------------------------------------------------------------- rules for tables


@pytest.fixture(scope="module")
def with_tables(tmp_path_factory):
    """A run of a pipeline with two tables, before its bank is built; their names."""
    subject = look_at("digits-dit")
    settings = make_settings(subject, target_bits=4.0, target_bytes=None, trials=30, seed=0,
                             options=OPTIONS, effort=Effort(2, 1, 2, 1))  # fmt: skip
    run = Run.create(tmp_path_factory.mktemp("tables") / "run", settings)
    describe(run, subject)
    return run, subject, [table.name for table in subject.tables]


def test_every_form_of_rule_for_a_table_counts_in_a_run(with_tables):
    run, subject, names = with_tables
    first, kind = names[0], subject.tables[0].op_type
    alike = [table.name for table in subject.tables if table.op_type == kind]

    def found(**rules):
        return tables_of(run, Recipe(model="digits-dit", default="uniform-channel-4", **rules), subject.layers)

    assert found(embeddings="uniform-channel-8") == run.settings.embeddings == "uniform-channel-8"
    assert found() == {}
    assert found(embeddings="kmeans-channel-4") == dict.fromkeys(names, "kmeans-channel-4")
    assert found(layers={first: "uniform-channel-3"}) == {first: "uniform-channel-3"}
    assert found(patterns={f"*{first[8:]}": "uniform-channel-3"})[first] == "uniform-channel-3"
    assert found(types={kind: "uniform-channel-3"}) == dict.fromkeys(alike, "uniform-channel-3")
    rest = dict.fromkeys(names, "uniform-channel-8")
    assert found(embeddings="uniform-channel-8", layers={first: None}) == {k: v for k, v in rest.items() if k != first}
    with pytest.raises(QuantDMError, match="no_such"):
        found(layers={"no_such": "uniform-channel-3"})


def test_a_job_with_rules_for_tables_measures_what_the_recipe_applies(tmp_path):
    pipe, protocol = make("consistency")
    subject, (table,) = look_at(pipe), [each.name for each in look_at(pipe).tables]
    settings = make_settings(subject, target_bits=6.0, target_bytes=None, trials=30, seed=0, protocol=protocol,
                             options=OPTIONS, effort=Effort(2, 1, 2, 1))  # fmt: skip
    run = Run.create(tmp_path / "run", settings)
    build_bank(run, subject)
    labels = {layer.name: None for layer in subject.layers}
    job = Job(Draw(5, 3, 1), labels, embeddings={table: "uniform-channel-2"})
    assert "each by a rule of its own" in job.description
    assert Job.from_dict(json.loads(json.dumps(asdict(job)))) == job
    evaluator = Evaluator(run, subject)
    measured, plain = evaluator.samples(job), evaluator.samples(replace(job, embeddings=None))
    assert not torch.equal(measured.images, plain.images)
    apply_recipe(pipe, Recipe(model="consistency", default="original", layers={table: "uniform-channel-2"}))
    applied = as_bytes(generate(pipe, protocol, job.draw.seeds))
    assert (applied.int() - measured.images.int()).abs().max() <= 1


def test_a_recipe_of_a_run_with_a_rule_for_one_table_is_measured_and_exported(finished, tmp_path):
    run = Run.open(shutil.copytree(finished[0], tmp_path / "run"))
    table = json.loads(run.path("layers.json").read_text())["tables"][0]["name"]
    recipe = load_recipe(run.path("recipe.yaml"))
    mine = recipe.model_copy(update={"layers": {**recipe.layers, table: "uniform-channel-3"}, "embeddings": None})
    run.path("recipe.yaml").write_text(mine.to_yaml())
    space = load_space(run)
    jobs = final_jobs(run, space, mine, usual_activations(load_pipeline("digits-dit").transformer, 6), None)
    assert jobs["recipe"][0].embeddings == {table: "uniform-channel-3"}
    assert jobs["uniform-w4"][0].embeddings == run.settings.embeddings
    export_run(run, tmp_path / "export", say=str)
    header, _ = read_headers(tuple(weight_files(tmp_path / "export" / "transformer")))
    assert header.table[table].scheme == Scheme.parse("uniform-channel-3")


# ----------------------------------------------------------------------------------------------------------- metrics


METRICS = ("kid", "precision", "ssim", "agreement", "inception_score")


def test_metrics_that_a_protocol_names_are_those_of_the_registry(dit):
    protocol = load_protocol("digits-dit").model_copy(update={"version": 2, "steps": 2, "metrics": METRICS})
    pair = [draw_samples(dit, protocol, load_extractor("digits"), Draw(seed, 8, 2)) for seed in (1, 2)]
    figures = chosen_figures(*pair, protocol)
    assert set(figures) == {
        "kid_fp", "kid_real", "precision_fp", "precision_real", "ssim_fp", "agreement", "inception_score",
    }  # fmt: skip
    assert figures["kid_fp"] == pytest.approx(kid(pair[0].features, pair[1].features, paired=True)[0])
    images = [samples.images.float() / 255 for samples in pair]
    assert figures["ssim_fp"] == pytest.approx(ssim_each(*images).mean().item())
    row = evaluate(dit, protocol=protocol, reference=dit, num_images=8, seeds=[1], steps=2)["rows"][0]
    assert row["ssim_fp"] == pytest.approx(1)
    assert row["kid_real"] == pytest.approx(figures["kid_real"])


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"metrics": ["kidd"]}, "metrics: got 'kidd'; nearest: kid"),
        ({"metrics": ["fd"]}, "fd: is always there, as fid_fp"),
        ({"metrics": ["agreement"]}, "agreement: needs features with class scores"),
        ({"metrics": ["cmmd"]}, "cmmd: needs features clip:PATH"),
        ({"metrics": ["clip_score"]}, "clip_score: needs a CLIP model"),
        ({"metrics": ["kid"], "output": "latent"}, "metrics: are of images"),
    ],
)
def test_metrics_that_cannot_be_computed_are_refused_at_the_door(said, message):
    pipe, protocol = make("ddpm")
    with pytest.raises(QuantDMError, match=message):
        evaluate(pipe, protocol=Protocol(**{**protocol.model_dump(), **said}), num_images=2, seeds=[1])


def test_metrics_that_need_more_images_than_there_are_are_refused_before_any_is_made(tmp_path, monkeypatch):
    pipe, protocol = make("ddpm")
    many = Protocol(**{**protocol.model_dump(), "metrics": ["precision"]})
    with pytest.raises(QuantDMError, match="precision: got 5 images that are judged, expected 6 or more"):
        check_measures(pipe, many, images=5)
    with pytest.raises(QuantDMError, match="precision: got 5 images that are judged"):
        evaluate(pipe, protocol=many, num_images=5, seeds=[1])
    for i in range(3):
        (tmp_path / "real").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (i, 9, 9)).save(tmp_path / "real" / f"{i}.png")
    few = many.model_copy(update={"real": str(tmp_path / "real")})
    with pytest.raises(QuantDMError, match="precision: got 3 real images, expected 6 or more; or leave it out"):
        quantdm.run(pipe, target_bits=4.0, protocol=few, run_dir=tmp_path / "run", say=str)
    assert not (tmp_path / "run").exists()
    assert real_floor(few) is None  # halves of one picture


def test_as_many_images_as_a_metric_is_said_to_need_are_enough():
    torch.manual_seed(0)
    x, y = torch.randn(SIZES, 3), torch.randn(MORE, 3)
    frechet_infinity(x, Moments.of(torch.randn(9, 3)))
    with pytest.raises(QuantDMError, match=f"got {SIZES - 1}, expected {SIZES} or more"):
        frechet_infinity(x[1:], Moments.of(torch.randn(9, 3)))
    neighbour_figures(y, y)
    with pytest.raises(QuantDMError, match="neighbours"):
        neighbour_figures(y[1:], y[1:])


def test_metrics_change_nothing_of_what_was_recorded(tmp_path):
    plain = load_protocol("digits-dit")
    assert "metrics" not in plain.model_dump(mode="json")
    more = Protocol(**{**plain.model_dump(), "version": 2, "metrics": ["kid", "kid"]})
    assert more.metrics == ("kid",)
    check_chosen(more)
    subject = look_at("digits-dit")
    asked = {"target_bits": 4.0, "target_bytes": None, "trials": 30, "seed": 0}
    two = plain.model_copy(update={"version": 2})
    run = Run.create(tmp_path / "run", make_settings(subject, **asked, protocol=two))
    assert Run.create(tmp_path / "run", make_settings(subject, **asked, protocol=more)).settings.protocol == more
    assert run.settings.protocol == two


def test_the_schema_of_protocols_is_shipped_and_knows_every_shipped_one():
    assert json.loads(SCHEMA.read_text()) == protocol_schema()
    known = protocol_schema()["properties"]
    assert set(known) == set(Protocol.model_fields)
    for name in known_protocols():
        data = yaml.safe_load((ROOT / "calib_data" / f"{name}.yaml").read_text())
        assert set(data) <= set(known), name
    shown = CliRunner().invoke(app, ["schema", "--protocol"])
    assert json.loads(shown.output) == protocol_schema()


def test_real_images_of_a_folder_and_metrics_by_name_come_from_one_file(tmp_path):
    for i in range(6):
        noise = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        (tmp_path / "real").mkdir(exist_ok=True)
        Image.fromarray(noise.numpy()).save(tmp_path / "real" / f"{i}.png")
    file = tmp_path / "mine.yaml"
    file.write_text("version: 2\nargument: none\nsteps: 2\nfeatures: pyramid\nreal: real\nmetrics: [kid, ssim]\n")
    pipe, _ = make("ddpm")
    row = evaluate(pipe, protocol=load_protocol(file), reference=pipe, num_images=6, seeds=[1])["rows"][0]
    assert {"fid_real", "kid_fp", "kid_real", "ssim_fp"} <= set(row)


# ------------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    ("command", "told"), [("run", "run the same command again"), ("inspect", "nothing was written")]
)
def test_an_interruption_says_what_is_kept(command, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quantdm", command])
    monkeypatch.setattr(command_line, "app", command_line._interrupt)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as ended:
            command_line.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere", "--target-bits", "4"], "there is no ./nowhere; expected a directory"),
        (["nobody/nowhere"], "target: give exactly one of target_bits (--target-bits"),
        (["./nowhere", "--target-bits", "4", "--trials", "5"], "trials: got 5, expected 30 or more"),
        (["nobody/nowhere", "--target-bits", "4", "--dtype", "int8"], "dtype: got 'int8'"),
        (["digits-dit", "--target-bits", "4", "--device", "gpu"], "expected cpu, cuda, cuda:1 or mps; torch knows no"),
    ],
)
def test_what_a_newcomer_gets_wrong_is_said_in_the_words_of_the_command_line(arguments, message):
    found = CliRunner().invoke(app, ["run", *arguments])
    assert isinstance(found.exception, QuantDMError)
    assert message in str(found.exception)
    assert len(str(found.exception)) < 300


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "quantdm", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("quantdm ")
