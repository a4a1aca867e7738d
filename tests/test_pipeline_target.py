"""A size for the whole pipeline: shared by its parts before the trials, met to the byte, measured and said as it is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from typer.testing import CliRunner

import quantdm
from quantdm import QuantDMError, load_recipe, look_at, search
from quantdm.cli.main import app
from quantdm.corridor.export import export_run
from quantdm.corridor.levels import Level
from quantdm.corridor.run import _Way, run
from quantdm.files import read_json
from quantdm.hub.model_card import write_card
from quantdm.hub.size import weight_bytes
from quantdm.metrics.samples import Draw
from quantdm.modules import packed_layers
from quantdm.report.records import read_records
from quantdm.report.split import split as split_section
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import Evaluator, Job
from quantdm.runs.room import Room, room_of
from quantdm.runs.run import Run
from quantdm.runs.search import start_run
from quantdm.runs.settings import MIN_TRIALS, Effort
from quantdm.runs.split import SPLIT_FILE, parts_of
from quantdm.schemes import TABLE_SCHEME
from quantdm.tuning import TuneSettings
from tests.tiny_parts import network
from tests.tiny_search import OPTIONS
from tests.walk_kinds import KINDS, protocol_of

TINY = Level(MIN_TRIALS, Effort(4, 1, 4, 1, 2, 0, 1), 4, 2, TuneSettings(steps=2, rows=2, every=1), 2)
OTHERS = {"text_encoder", "text_encoder_2", "vae"}


def measured_in(place: Path) -> list[Path]:
    """Return the records of trials and of what decides the split."""
    return [path for kind in ("trials", "split") for path in (place / kind).glob("*.json")]


def small() -> DiffusionPipeline:
    """Return SDXL's parts with a U-Net of one level."""
    pipe, blocks = KINDS["sdxl"][0](), {"block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",)}
    settings = {key: value for key, value in pipe.unet.config.items() if not key.startswith("_")}
    pipe.register_modules(
        unet=network("UNet2DConditionModel", settings | blocks | {"up_block_types": ("CrossAttnUpBlock2D",)})
    )
    return pipe


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> tuple[Path, Room]:
    """A stored SDXL pipeline, and what is to be had of a target about half of its size."""
    folder = tmp_path_factory.mktemp("target") / "sdxl"
    small().save_pretrained(folder)
    free = room_of(look_at(str(folder)), OPTIONS, TABLE_SCHEME, 10**9, at_most=False)
    return folder, replace(free, target=(free.smallest + free.as_stored + sum(free.denoisers)) // 2)


@pytest.fixture(scope="module")
def whole(stored):
    """The way to that target up to the export, the search once more, what was said, and what was measured before."""
    folder, room = stored
    place, said = folder.with_name("run"), []
    asked: dict[str, Any] = {"target_pipeline_bytes": room.target, "options": OPTIONS, "protocol": protocol_of("sdxl")}
    asked |= {"trials": MIN_TRIALS, "effort": TINY.effort}
    started, subject = start_run(look_at(str(folder)), place, **asked)
    with Engine(started, subject, workers=1) as engine:
        summary = _Way(started, engine, TINY, said.append).walk(tuned=False)
    times = {path: path.stat().st_mtime_ns for path in measured_in(place)}
    recipe = search(folder, run_dir=place, workers=1, **asked)
    export_run(Run.open(place), place / "export", tuned=False, say=str)
    return place, summary, recipe, said, times


def test_the_files_of_all_parts_stay_within_the_target_and_are_those_that_were_foretold(stored, whole) -> None:
    place, summary, _, _, _ = whole
    target, split = stored[1].target, read_json(place / SPLIT_FILE)
    rows = {row["name"]: row for row in summary["rows"]}
    found = {part: sum(f.stat().st_size for f in (place / "export" / part).glob("*.safetensors")) for part in OTHERS}
    assert found == {name: part["after"] for name, part in split["parts"].items()}
    assert weight_bytes(place / "export") == sum(found.values()) + rows["recipe"]["denoiser_bytes"]
    left = target - weight_bytes(place / "export")  # of which nothing more is to be had: no part as it was
    assert 0 <= left < min(part["before"] - part["after"] for part in split["parts"].values() if part["label"])
    of_use = min(split["denoisers"]["at_most"], stored[1].denoisers[1])
    assert rows["recipe"]["denoiser_bytes"] > 0.9 * of_use
    assert rows["recipe"]["denoiser_bytes"] <= split["denoisers"]["at_most"] == target - sum(found.values())
    before = {part: sum(f.stat().st_size for f in (stored[0] / part).glob("*.safetensors")) for part in OTHERS}
    assert before == {name: part["before"] for name, part in split["parts"].items()}


def test_plain_diffusers_opens_what_was_shared_out(whole) -> None:
    place = whole[0]
    split, opened = read_json(place / SPLIT_FILE)["parts"], DiffusionPipeline.from_pretrained(place / "export")
    assert {part["label"] is None for part in split.values()} <= {True, False}
    assert any(part["label"] is not None for part in split.values())  # half the size is not reached without them
    for name, part in split.items():
        assert bool(packed_layers(getattr(opened, name))) == (part["label"] is not None)


def test_a_second_call_measures_nothing_again_and_keeps_the_split(whole) -> None:
    place, _, recipe, said, times = whole
    assert {path: path.stat().st_mtime_ns for path in measured_in(place)} == times
    assert recipe == load_recipe(place / "recipe.yaml")
    settings = Run.open(place).settings
    assert settings.target_bits == read_json(place / SPLIT_FILE)["target_bits"] >= recipe.avg_bits
    assert any(line.strip().startswith("unet: ") and "bytes remain" in line for line in said)


def test_recipe_card_and_report_say_how_the_bytes_are_split(stored, whole) -> None:
    place, split = whole[0], read_json(whole[0] / SPLIT_FILE)["parts"]
    recipe = load_recipe(place / "recipe.yaml")
    quantized = {name: part["label"] for name, part in split.items() if part["label"] is not None}
    assert parts_of(Run.open(place), recipe) == quantized
    assert {name: rules.default for name, rules in recipe.components.items()} == quantized
    assert f"{stored[1].target} bytes, the weights of the whole pipeline" in recipe.provenance.target
    card = write_card(place / "export", summary=place / "summary.json").read_text()  # which finds its own figures
    page = split_section(read_records(place))
    for name, part in split.items():
        assert f"{name}: {part['before']} bytes" in card
        assert f'<th scope="row">{name}</th>' in page
    assert f"{stored[1].target:,} bytes" in page


def test_rows_are_measured_with_the_other_parts_as_the_export_has_them(whole) -> None:
    place = whole[0]
    run_ = Run.open(place)
    evaluator = Evaluator(run_, run_.open_subject())
    draw, parts = Draw(7, 2, 1), parts_of(run_, load_recipe(place / "recipe.yaml"))
    before = evaluator.samples(Job(draw)).images
    own = evaluator.samples(Job(draw, parts=parts)).images
    assert not torch.equal(own, before)
    assert torch.equal(evaluator.samples(Job(draw)).images, before)  # nothing is left behind
    assert Job(draw, parts=parts).key != Job(draw).key


def test_other_rules_for_a_part_than_those_of_the_split_are_not_taken_for_measured(whole) -> None:
    place = whole[0]
    recipe, run_ = load_recipe(place / "recipe.yaml"), Run.open(place)
    name = next(iter(parts_of(run_, recipe)))
    with pytest.raises(QuantDMError, match=rf"also quantizes {name}, which a run does not measure"):
        parts_of(run_, recipe.override([f"{name}:*=kmeans-channel-4"]))


def test_a_dry_run_says_what_remains_for_the_denoiser(stored, tmp_path) -> None:
    folder, room = stored
    said: list[str] = []
    record = run(
        folder, target_pipeline_bytes=room.target, run_dir=tmp_path / "run", options=OPTIONS, effort="quick",
        protocol=protocol_of("sdxl"), workers=1, dry_run=True, say=said.append,
    )  # fmt: skip
    assert record["split"]["rest"] == room.rest
    assert f"{room.target - room.smallest:,} bytes remain for the denoisers" in said[-1]
    assert "other parts" in [stage["name"] for stage in record["stages"]]
    assert not (tmp_path / "run").exists()


def test_what_nothing_meets_is_refused_before_anything_is_written(stored, tmp_path) -> None:
    folder, room = stored
    place = tmp_path / "run"

    def asked(**targets) -> None:
        search(folder, run_dir=place, options=OPTIONS, protocol=protocol_of("sdxl"), trials=MIN_TRIALS, **targets)

    least = room.smallest + room.denoisers[0]
    with pytest.raises(QuantDMError, match=rf"got 1000 bytes for the pipeline, expected {least} or more: already the"):
        asked(target_pipeline_bytes=1000)
    with pytest.raises(QuantDMError, match=rf"expected {least} or more: other parts take {room.smallest} at least"):
        asked(target_pipeline_bytes=least - 1)
    with pytest.raises(QuantDMError, match=rf"reach {least} to {room.as_stored + room.denoisers[1]} bytes"):
        asked(target_pipeline_bytes=10**9)
    for other in ({"target_bits": 3.0}, {"target_bytes": 10**5}):
        with pytest.raises(QuantDMError, match="give exactly one of target_bits"):
            asked(target_pipeline_bytes=room.target, **other)
    with pytest.raises(QuantDMError, match="the pipeline is in memory, where it has no files"):
        quantdm.search(
            small(), target_pipeline_bytes=room.target, run_dir=place, options=OPTIONS,
            protocol=protocol_of("sdxl"), trials=MIN_TRIALS,
        )  # fmt: skip
    both = ["run", str(folder), "--target-pipeline-size", "6GB", "--target-bits", "3", "--run-dir", str(place)]
    refused = CliRunner().invoke(app, both)
    assert isinstance(refused.exception, QuantDMError)
    assert "(--pipeline-size, all parts" in str(refused.exception)
    assert not place.exists()
