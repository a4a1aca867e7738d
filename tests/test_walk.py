"""Whole walks: two kinds of pipelines go from run to evaluate here, and the record of all kinds is what docs say."""

import re

import pytest
import yaml

from quantdm.files import read_json
from quantdm.hub.inspection import inspect_target
from tests.test_denoiser_classes import script
from tests.test_families import ROOT
from tests.walk_kinds import KINDS

WALK = script("walk")
RECORD = read_json(WALK.RESULTS)
WALKED = ("cogvideox", "consistency")  # of those that take little time: a transformer of videos, a U-Net of one step


def test_every_cell_of_the_page_is_recorded() -> None:
    page = (ROOT / "docs" / "support.md").read_text()
    table = re.search(r"<!-- walk:begin -->\n(.*)\n<!-- walk:end -->", page, re.DOTALL)
    assert table is not None
    assert table[1] == script("support_matrix").walked(RECORD)
    rows = {row[0]: row for line in table[1].splitlines() if (row := line.strip("| ").split(" | "))[0] in KINDS}
    assert set(rows) == set(RECORD["kinds"]) == set(KINDS)
    for kind, row in rows.items():
        found = RECORD["kinds"][kind]
        assert row[1:3] == [found["pipeline"], found["scheduler"]]
        assert row[4:] == ["yes" if found["steps"][step] == "yes" else "**no**" for step in found["steps"]]


def test_sixteen_kinds_and_more_walk_the_whole_way_and_no_step_is_skipped() -> None:
    assert len(KINDS) >= 16
    for kind, found in RECORD["kinds"].items():
        assert set(found["steps"]) == set(WALK.STEPS), kind
        assert set(found["steps"].values()) == {"yes"}, (kind, found["steps"])


@pytest.mark.parametrize("package", ["diffusers", "transformers", "torch"])
def test_the_walk_was_taken_with_the_versions_of_the_lock(package) -> None:
    locked = re.search(rf"^{package}==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked is not None
    assert RECORD["versions"][package].partition("+")[0] == locked[1].partition("+")[0]


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """Two kinds, walked; one new process opened them all."""
    folder = tmp_path_factory.mktemp("walk")
    found = {kind: WALK.walk(kind, folder) for kind in WALKED}
    later = WALK.open_all(folder, WALKED)
    return folder, {kind: found[kind]["steps"] | later[kind] for kind in WALKED}


def test_two_kinds_take_every_step(walked) -> None:
    _, steps = walked
    assert steps == {kind: dict.fromkeys(WALK.STEPS, "yes") | steps[kind] for kind in WALKED}
    assert {said for found in steps.values() for said in found.values()} == {"yes"}


@pytest.mark.parametrize(
    ("kind", "task", "call"),
    [
        ("cogvideox", "text-to-video", ".frames[0]"),
        ("consistency", "unconditional-image-generation", "class_labels="),
    ],
)
def test_a_card_fits_its_kind(kind, task, call, walked) -> None:
    folder, _ = walked
    card = (folder / "runs" / kind / "export" / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["pipeline_tag"] == task
    assert head["license"] == WALK.FRONT["license"]
    assert head["base_model"] == WALK.FRONT["base_model"]  # as the source's own card says: never a place on this disk
    assert str(folder) not in card.split("## Recipe")[0]
    assert call in card
    for part in inspect_target(str(folder / "runs" / kind / "export"))["parts"]:
        assert (f"| {part['name']} | {part['class']} |" in card) == (part["nbytes"] is not None)
