"""A size for the whole pipeline: shared by its parts before the trials, met to the byte, measured and said as it is."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from typer.testing import CliRunner

import quantdm
from quantdm import QuantDMError, load_recipe, look_at, search
from quantdm.cli.main import app
from quantdm.corridor.levels import LEVELS, Level
from quantdm.corridor.run import run
from quantdm.files import read_json
from quantdm.hub.model_card import write_card
from quantdm.hub.size import weight_bytes
from quantdm.metrics.samples import Draw
from quantdm.modules import packed_layers
from quantdm.report.page import write_report
from quantdm.runs.evaluator import Evaluator, Job
from quantdm.runs.room import Room, room_of
from quantdm.runs.run import Run
from quantdm.runs.settings import MIN_TRIALS, Effort
from quantdm.runs.split import SPLIT_FILE, parts_of
from quantdm.schemes import TABLE_SCHEME
from quantdm.tuning import TuneSettings
from tests.tiny_search import OPTIONS
from tests.walk_kinds import KINDS, protocol_of

TINY = Level(MIN_TRIALS, Effort(4, 1, 4, 1, 2, 0, 1), 4, 2, TuneSettings(steps=2, rows=2, every=1), 2)
OTHERS = {"text_encoder", "text_encoder_2", "vae"}


def measured_in(place: Path) -> list[Path]:
    """Return the records of trials and of what decides the split."""
    return [path for kind in ("trials", "split") for path in (place / kind).glob("*.json")]


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> tuple[Path, Room]:
    """A stored SDXL pipeline, and what is to be had of a target about half of its size."""
    folder = tmp_path_factory.mktemp("target") / "sdxl"
    KINDS["sdxl"][0]().save_pretrained(folder)
    subject = look_at(str(folder))
    free = room_of(subject, OPTIONS, TABLE_SCHEME, 10**9, at_most=False)
    target = (free.smallest + free.as_stored + sum(free.denoisers)) // 2
    return folder, replace(free, target=target)


@pytest.fixture(scope="module")
def whole(stored):
    """The whole way to that target, twice; what was said, and what was there after the first time."""
    folder, room = stored
    place, said = folder.with_name("run"), []
    asked = {"target_pipeline_bytes": room.target, "run_dir": place, "options": OPTIONS, "workers": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LEVELS, "tiny", TINY)
        first = run(folder, **asked, effort="tiny", protocol=protocol_of("sdxl"), say=said.append)
        times = {
            path: path.stat().st_mtime_ns for kind in ("trials", "split") for path in (place / kind).glob("*.json")
        }
        again = run(folder, **asked, effort="tiny", protocol=protocol_of("sdxl"), say=str)
    return place, first, again, said, times


def test_the_files_of_all_parts_stay_within_the_target_and_are_those_that_were_foretold(stored, whole) -> None:
    place, summary, _, said, _ = whole
    target, split = stored[1].target, read_json(place / SPLIT_FILE)
    rows = {row["name"]: row for row in summary["rows"]}
    found = {part: sum(f.stat().st_size for f in (place / "export" / part).glob("*.safetensors")) for part in OTHERS}
    assert found == {name: part["after"] for name, part in split["parts"].items()}
    assert weight_bytes(place / "export") == sum(found.values()) + rows["recipe"]["denoiser_bytes"]
    assert 0.9 * target < weight_bytes(place / "export") <= target
    assert rows["recipe"]["denoiser_bytes"] <= split["denoisers"]["at_most"] == target - sum(found.values())
    before = {part: sum(f.stat().st_size for f in (stored[0] / part).glob("*.safetensors")) for part in OTHERS}
    assert before == {name: part["before"] for name, part in split["parts"].items()}
    assert any(
        f"all parts {weight_bytes(place / 'export') / 1e6:.2f} of {target / 1e6:.2f} MB" in line for line in said
    )


def test_plain_diffusers_opens_what_was_shared_out(whole) -> None:
    place = whole[0]
    split, opened = read_json(place / SPLIT_FILE)["parts"], DiffusionPipeline.from_pretrained(place / "export")
    assert {part["label"] is None for part in split.values()} <= {True, False}
    assert any(part["label"] is not None for part in split.values())  # half the size is not reached without them
    for name, part in split.items():
        assert bool(packed_layers(getattr(opened, name))) == (part["label"] is not None)


def test_a_second_call_does_nothing_again(whole) -> None:
    place, first, again, _, times = whole
    assert again["rows"] == first["rows"]
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert set(measured_in(place)) == set(times)
    assert Run.open(place).settings.target_bits == read_json(place / SPLIT_FILE)["target_bits"]


def test_recipe_card_and_report_say_how_the_bytes_are_split(stored, whole) -> None:
    place, split = whole[0], read_json(whole[0] / SPLIT_FILE)["parts"]
    recipe = load_recipe(place / "recipe.yaml")
    quantized = {name: part["label"] for name, part in split.items() if part["label"] is not None}
    assert parts_of(Run.open(place), recipe) == quantized
    assert {name: rules.default for name, rules in recipe.components.items()} == quantized
    assert f"{stored[1].target} bytes, the weights of the whole pipeline" in recipe.provenance.target
    card = write_card(place / "export", summary=place / "summary.json").read_text()  # which finds its own figures
    page = write_report(place).read_text()
    for name, part in split.items():
        assert f"{name}: {part['before']} bytes" in card
        assert f'<th scope="row">{name}</th>' in page
    assert 'id="split-title">Part by part' in page
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
            KINDS["sdxl"][0](), target_pipeline_bytes=room.target, run_dir=place, options=OPTIONS,
            protocol=protocol_of("sdxl"), trials=MIN_TRIALS,
        )  # fmt: skip
    both = ["run", str(folder), "--target-pipeline-size", "6GB", "--target-bits", "3", "--run-dir", str(place)]
    refused = CliRunner().invoke(app, both)
    assert isinstance(refused.exception, QuantDMError)
    assert "--target-pipeline-size" in str(refused.exception)
    assert not place.exists()
