"""From a trained pipeline to a smaller one that plain diffusers opens, with a report: every stage, on real input."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, cycle

import pytest
import torch
from diffusers import ScoreSdeVeScheduler
from safetensors.torch import load_file

from quantdm import (
    ActivationSpec,
    QuantDMError,
    Recipe,
    Scheme,
    apply_correction,
    apply_recipe,
    export_pipeline,
    get_denoiser,
    list_layers,
    list_tables,
    load_correction,
    load_pipeline,
    load_protocol,
    load_recipe,
    set_activation_bits_,
    write_report,
)
from quantdm.activations import usual_activations
from quantdm.corridor.export import export_run
from quantdm.corridor.table import show_table
from quantdm.hub.export import lossless_dtype
from quantdm.hub.model_card import write_card
from quantdm.hub.size import ExportSize, denoiser_bytes
from quantdm.metrics.statistics import spread
from quantdm.pipelines import generate as generating
from quantdm.pipelines.generate import generate, image_generators
from quantdm.pipelines.subject import look_at
from quantdm.quantizers import count_bits
from quantdm.recipe import weights_digest
from quantdm.report.charts import MARKS
from quantdm.report.insights import MIXES
from quantdm.report.samples import ROWS as SAMPLE_ROWS
from quantdm.report.sections import ROW_NAMES
from quantdm.runs import final
from quantdm.runs.correct import correct_recipe, correct_run
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import job_of
from quantdm.runs.run import Run
from quantdm.runs.store import TrialStore
from quantdm.runs.summary import write_summary
from quantdm.runs.trials import label_draw
from quantdm.surrogates import SearchSpace

MIX = [
    Scheme(method=method, bits=bits, granularity=granularity)
    for method, granularity, bits in (
        ("kmeans", "channel", 3), ("uniform", "channel", 4), ("kmeans", "tensor", 2), ("log2", "channel", 5),
        ("uniform", "tensor", 6), ("kmeans", "channel", 8),
    )
]  # fmt: skip

RELOAD = """
import json, sys, torch, quantdm
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
index = json.load(open(sys.argv[1] + "/model_index.json"))
absent = {name: None for name, value in index.items() if value == [None, None]}  # diffusers wants to be told
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], **absent)
images = quantdm.generate(pipe, quantdm.load_protocol(sys.argv[2]), range(4), steps=3)
from safetensors.torch import save_file
save_file({"images": images}, sys.argv[3])
"""


def mixed_recipe(name):
    """A recipe that mixes methods, granularities and widths over the layers, with one layer left alone."""
    layers = list_layers(get_denoiser(load_pipeline(name)))
    labels: dict[str, str | None] = {la.name: s.label for la, s in zip(layers, cycle(MIX), strict=False)}
    labels[layers[-1].name] = None
    return Recipe(model=name, layers=labels)


@pytest.mark.parametrize("name", ["digits-dit", "digits-flow", "digits-sd"])
def test_an_export_opens_in_a_new_process_with_identical_images_and_the_counted_size(name, tmp_path):
    recipe, protocol = mixed_recipe(name), load_protocol(name)
    pipe = load_pipeline(name)
    counted = ExportSize(pipe).of(recipe.config)
    images = generate(apply_recipe(pipe, recipe, insist=True), protocol, range(4), steps=3)
    folder = export_pipeline(name, recipe, tmp_path / "export")
    assert denoiser_bytes(folder, load_pipeline(folder)) == counted
    command = [sys.executable, "-c", RELOAD, str(folder), name, str(tmp_path / "images.safetensors")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    reloaded = load_file(tmp_path / "images.safetensors")["images"]
    assert (reloaded - images).abs().max() == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "images.safetensors"]


def test_export_finds_the_narrowest_lossless_dtype(dit):
    assert lossless_dtype(dit.transformer) == torch.float16
    with torch.no_grad():
        parameter = next(dit.transformer.parameters())
        value = parameter.flatten()[0].clone()
        parameter.view(-1)[0] = 1 / 3
        assert lossless_dtype(dit.transformer) == torch.float32
        parameter.view(-1)[0] = value


def test_a_failed_export_leaves_the_old_one(tmp_path):
    folder = export_pipeline("digits-dit", mixed_recipe("digits-dit"), tmp_path / "export")
    before = {p.name: p.stat().st_mtime_ns for p in folder.rglob("*")}
    wrong = Recipe(model="other", layers={"nothing": None})
    with pytest.raises(QuantDMError, match="nothing"):
        export_pipeline("digits-dit", wrong, folder)
    assert {p.name: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


@pytest.fixture(scope="module")
def measured(finished):
    """The finished tiny run with correction, rows, grids and summary, and the seeds that each of them started from."""
    folder, recipe = finished
    run = Run.open(folder)
    pipe = load_pipeline("digits-dit")
    denoiser = get_denoiser(pipe)
    space = SearchSpace.load(run.path("space.json"))
    spec = usual_activations(denoiser, 6)
    seeds: dict[str, set[int]] = {"correction": set(), "final": set()}
    with Engine(run, look_at(pipe), workers=1) as engine, pytest.MonkeyPatch.context() as patch:

        def watch(stage):
            def generators(of):
                seeds[stage].update(of)
                return image_generators(of)

            patch.setattr(generating, "image_generators", generators)

        watch("correction")
        correction = correct_run(run, engine, recipe, spec, images=8)
        watch("final")
        draws = [final.Draw(d.base_seed, 42, 3) for d in final.final_draws(run, images=42)]
        jobs = final.final_jobs(run, space, recipe, spec, str(correction))
        size = ExportSize(pipe, embeddings=run.settings.embeddings)
        rows = final.measure_rows(run, engine, space, jobs, draws, size)
        final.save_grids(run, engine, jobs, draws[0])
        summary = write_summary(run, rows, draws, final.sampling_noise(engine, draws))
        before = run.path("samples.safetensors").stat().st_mtime_ns
        final.save_grids(run, engine, jobs, draws[0])
        assert run.path("samples.safetensors").stat().st_mtime_ns == before  # grids of the same jobs are kept
        shown = load_file(run.path("samples.safetensors"))
        assert torch.equal(shown["fp"], engine.local.reference(draws[0]).images[: final.GRID_IMAGES])
        alike = {**jobs, "recipe": jobs["uniform-next-width"]}  # as a recipe may be that was changed by hand
        final.save_grids(run, engine, alike, draws[0])
        twice = load_file(run.path("samples.safetensors"))
        assert torch.equal(twice["recipe"], shown["uniform-next-width"])
        final.save_grids(run, engine, jobs, draws[0])
    return run, summary, seeds


def test_the_summary_has_a_row_for_everything_that_the_page_and_the_readme_speak_of(measured):
    run, summary, _ = measured
    assert json.loads(run.path("summary.json").read_text()) == summary
    rows = {row["name"]: row for row in summary["rows"]}
    assert list(rows) == [name for name in ROW_NAMES if name != "recipe-untuned"]  # this run was not tuned
    assert set(MARKS) | set(SAMPLE_ROWS) | set(final.GRID_ROWS) | set(MIXES) <= set(rows)
    assert set(load_file(run.path("samples.safetensors"))) == set(final.GRID_ROWS)
    for row in rows.values():
        assert {"avg_bits", "denoiser_bytes", "fid_real", "fid_fp", "fid_fp_sd", "psnr_fp", "seconds"} <= set(row)
        assert (row["flagged"], row["constant"]) == (0, 0)
    assert rows["fp"]["fid_fp"] < 1e-9


def test_sizes_of_the_rows_are_those_of_the_weights_that_were_measured(measured, dit):
    run, summary, _ = measured
    rows = {row["name"]: row for row in summary["rows"]}
    weights = sum(layer.num_weights for layer in list_layers(get_denoiser(dit)))
    tables = [(table.num_weights, table.shape) for table in list_tables(get_denoiser(dit))]
    scheme = Scheme.parse(run.settings.embeddings)
    saved = sum(2 * entries - count_bits(shape, scheme) / 8 for entries, shape in tables)
    for row in rows.values():  # what is not quantized is the same in all of them, tables but in full precision
        more = (row["avg_bits"] - rows["recipe"]["avg_bits"]) * weights / 8 + (saved if row["name"] == "fp" else 0)
        assert row["denoiser_bytes"] - rows["recipe"]["denoiser_bytes"] == pytest.approx(
            more, rel=0.02, abs=16
        )  # the header is padded
    assert rows["fp"]["avg_bits"] == 16
    target = run.settings.target_bits
    for mix in ("recipe", "least-weight-error", "sensitivity-same-size"):
        assert target - 0.1 < rows[mix]["avg_bits"] <= target
    assert (
        rows["recipe+a6+correction"]["avg_bits"] == rows["recipe"]["avg_bits"] <= rows["uniform-next-width"]["avg_bits"]
    )


def test_every_stage_measures_on_noises_that_no_other_stage_saw(measured):
    run, summary, seeds = measured
    space, verified = SearchSpace.load(run.path("space.json")), TrialStore(run.path("verified"))
    draw = label_draw(run)
    for trial in TrialStore(run.path("trials")):  # a trial's key holds the draw that it was really measured on
        assert trial["key"] == job_of(run, draw, trial["config"]).key
    stages = seeds | {"labels": set(draw.seeds), "verification": set()}
    configs = json.loads(run.path("selection.json").read_text())["configs"]
    for base in range(draw.base_seed, draw.base_seed + 200):
        second = final.Draw(base, run.settings.verify_images, run.settings.steps_of_verification)
        if any(verified.get(job_of(run, second, labels).key) for labels in configs.values()):
            stages["verification"] |= set(second.seeds)
    assert len(stages["verification"]) == run.settings.verify_draws * run.settings.verify_images
    assert len(stages["correction"]) == 2 * 4 + 4 * 8
    images = summary["protocol"]["images"]
    assert len(stages["final"]) == len(summary["protocol"]["draws"]) * images
    for one, other in combinations(stages, 2):
        assert not stages[one] & stages[other], (one, other)
    assert len(space.layers) == len(next(iter(configs.values())))


def test_one_draw_is_told_without_a_spread_by_everything_that_reads_a_summary(measured, tmp_path, capsys):
    run, summary, _ = measured
    other = Run.open(shutil.copytree(run.folder, tmp_path / "run"))
    rows = [{**row, **{key: None for key in row if key.endswith("_sd")}} for row in summary["rows"]]
    rows[-1] |= {"flagged": 3, "constant": 1}
    one = {**summary, "rows": rows, "fp_noise": {"mean": None, "sd": None}}
    one["protocol"] = {**summary["protocol"], "draws": summary["protocol"]["draws"][:1]}
    other.path("summary.json").write_text(json.dumps(one))
    page = re.sub(r"<[^>]*>", "", write_report(other.folder).read_text().partition('id="insights"')[0])
    assert "One draw does not say which differences count" in page
    assert "±" not in page
    assert "Recipe, A6, corrected: 3 flagged by the safety checker, 1 others of one colour only" in page
    show_table(one)
    out = " ".join(capsys.readouterr().out.split())
    assert "±" not in out.partition("draws")[2]
    assert "the safety checker flagged 3 images" in out
    folder = export_run(other, tmp_path / "out")
    card = write_card(folder, summary=other.path("summary.json")).read_text()
    assert "±" not in card
    assert "recipe+a6+correction 3 and 1" in card


def test_the_table_fits_a_terminal(measured, capsys):
    show_table(measured[1])
    out = capsys.readouterr().out
    for row in measured[1]["rows"]:
        assert row["name"] in out
        assert spread(row["fid_fp"], row["fid_fp_sd"]) in out
    note = next(row["note"] for row in measured[1]["rows"] if row["name"] == "uniform-next-width")
    assert f"uniform-next-width: {note}." in out
    assert all(len(line) <= 79 for line in out.splitlines())


def test_the_report_is_one_file_that_needs_no_network(measured):
    run, summary, _ = measured
    page = write_report(run.folder).read_text()
    assert not [word for word in ("http://", "https://", 'src="//') if word in page.replace("http://www.w3.org", "")]
    for row in summary["rows"]:
        assert ROW_NAMES[row["name"]] in page
    for word in ("data:image/png", "<svg", "Images that show nothing"):
        assert (word in page) == (word != "Images that show nothing")


def test_a_run_exports_what_it_chose(measured, tmp_path):
    run, summary, _ = measured
    said = []
    folder = export_run(run, tmp_path / "out", say=said.append)
    size = denoiser_bytes(folder, load_pipeline(folder))
    recipe = next(row for row in summary["rows"] if row["name"] == "recipe")
    assert size == recipe["denoiser_bytes"]
    assert not (folder / "correction.safetensors").exists()  # it belongs to activations that this recipe has not
    assert said[0].startswith("correction: left out, for it belongs to 6-bit activations")
    assert said[0].endswith("--corrected")
    assert load_recipe(folder / "recipe.yaml").activations is None
    assert "| recipe |" in write_card(folder, summary=run.path("summary.json")).read_text()


def test_an_exported_correction_was_fitted_for_the_recipe_beside_it(measured, tmp_path):
    run, _, _ = measured
    said = []
    folder = export_run(run, tmp_path / "out", corrected=True, say=said.append)
    recipe, correction = load_recipe(folder / "recipe.yaml"), load_correction(folder / "correction.safetensors")
    assert recipe.activations == correction.activations == usual_activations(get_denoiser(load_pipeline(folder)), 6)
    assert correction.weights == weights_digest(recipe.layers)
    assert recipe.correction == "correction.safetensors"
    assert "6 bits" in said[0]
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["activations"] == recipe.activations.model_dump(mode="json")
    write_card(folder, summary=run.path("summary.json"))
    other = "bias" if correction.variant == "none" else "none"  # another correction is another pipeline
    correction.with_variant(other).save(folder / "correction.safetensors")
    (folder / "README.md").unlink()
    with pytest.raises(QuantDMError, match="measured other recipes"):
        write_card(folder, summary=run.path("summary.json"))


AS_THE_CARD_SAYS = """
import sys, torch
from safetensors.torch import save_file
torch.set_num_threads(1)
exec(sys.argv[1])
from quantdm.activations import activation_spec
assert activation_spec(pipe.transformer).bits == 6
images = quantdm.generate(pipe, quantdm.load_protocol("digits-dit"), range(2), steps=3)
save_file({"images": images}, sys.argv[2])
"""


def test_all_of_a_search_opens_with_plain_diffusers_and_makes_what_its_exporter_made(measured, tmp_path):
    """Searched weights, 6-bit activations and the correction, in a new process, by the lines of the model card."""
    run = Run.open(shutil.copytree(measured[0].folder, tmp_path / "run"))
    correction = load_correction(run.path("correction.safetensors")).with_variant("both")
    correction.save(run.path("correction.safetensors"))
    folder = export_run(run, tmp_path / "small", corrected=True, say=lambda line: None)
    card = write_card(folder).read_text()
    assert "its inputs are rounded, as it is opened: token-6 activations" in card
    assert "A correction of its sampler lies beside it" in card

    pipe, protocol = load_pipeline("digits-dit"), load_protocol("digits-dit")
    apply_recipe(pipe, load_recipe(run.path("recipe.yaml")), insist=True)
    only_weights = generate(pipe, protocol, range(2), steps=3)
    set_activation_bits_(pipe.transformer, correction.activations)
    uncorrected = generate(pipe, protocol, range(2), steps=3)
    expected = generate(apply_correction(pipe, correction), protocol, range(2), steps=3)
    assert not torch.equal(only_weights, uncorrected)
    assert not torch.equal(uncorrected, expected)

    snippet = card.partition("```python\n")[2].partition("```")[0]
    opening = "\n".join(line for line in snippet.splitlines() if not line.startswith("image = "))
    command = [sys.executable, "-c", AS_THE_CARD_SAYS, opening, str(tmp_path / "images.safetensors")]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert torch.equal(load_file(tmp_path / "images.safetensors")["images"], expected)


def test_a_correction_for_another_recipe_is_not_exported(measured, tmp_path):
    run, _, _ = measured
    recipe = load_recipe(run.path("recipe.yaml"))
    path = run.path("correction.safetensors")
    unknown = replace(load_correction(path), weights="", activations=None)
    old = unknown.save(tmp_path / "old.safetensors")  # as quantdm 0.1 wrote it
    assert load_correction(old).weights == ""
    six = recipe.model_copy(update={"activations": load_correction(path).activations})
    for other, file, expected in (
        (recipe, path, "fitted for 6-bit activations .* the recipe has activations that are not quantized"),
        (six.override(["*.to_q=uniform-channel-4"]), path, "other weights"),
        (six, old, "does not say which recipe"),
    ):
        with pytest.raises(QuantDMError, match=expected):
            export_pipeline("digits-dit", other, tmp_path / "out", correction=file)
    assert not (tmp_path / "out").exists()


def test_a_sampler_that_is_not_served_is_told_before_anything_is_computed(measured, tmp_path, monkeypatch):
    run, _, _ = measured
    copy = Run(shutil.copytree(run.folder, tmp_path / "run"), run.settings)
    opened = Run.open_subject

    def other(self, **given):
        subject = opened(self, **given)
        subject.pipe.scheduler = ScoreSdeVeScheduler()
        return subject

    monkeypatch.setattr(Run, "open_subject", other)
    with pytest.raises(QuantDMError, match=r"got scheduler ScoreSdeVeScheduler, .*this one is used without"):
        correct_recipe(copy, bits=6, images=4)


def test_a_correction_that_is_fitted_anew_replaces_the_old_one_only_when_it_is_whole(measured, tmp_path, monkeypatch):
    run, _, _ = measured
    copy = Run(shutil.copytree(run.folder, tmp_path / "run"), run.settings)
    before = copy.path("correction.safetensors").read_bytes()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("quantdm.runs.correct.fit_correction", interrupted)
    with pytest.raises(KeyboardInterrupt):
        correct_recipe(copy, bits=6, images=4)
    assert copy.path("correction.safetensors").read_bytes() == before


def test_six_bit_activations_change_images_and_come_off(dit):
    from quantdm import set_activation_bits_

    protocol, denoiser = load_protocol("digits-dit"), get_denoiser(dit)
    plain = generate(dit, protocol, range(4), steps=3)
    set_activation_bits_(denoiser, usual_activations(denoiser, 6))
    six = generate(dit, protocol, range(4), steps=3)
    set_activation_bits_(denoiser, ActivationSpec(bits=8))
    eight = generate(dit, protocol, range(4), steps=3)
    set_activation_bits_(denoiser, None)
    assert (six - plain).square().mean() > (eight - plain).square().mean() > 0
    assert torch.equal(generate(dit, protocol, range(4), steps=3), plain)
