"""The report: self-contained, complete, honest about missing records."""

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from quantdm.cli.main import app
from quantdm.errors import QuantDMError
from quantdm.files import read_json, save_tensors, write_json
from quantdm.recipe import Recipe
from quantdm.report import write_report
from quantdm.report.glance import how_small
from quantdm.report.page import SECTIONS
from quantdm.report.records import MADE_BY, read_records
from quantdm.report.sections import masthead
from quantdm.surrogates import SearchSpace
from tests.report_run import make_run, make_space

VOID = {"meta", "img", "br", "wbr", "link", "input", "hr"}


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return make_space()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, space: SearchSpace) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run", space)


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


@pytest.fixture
def copied(tmp_path: Path, run_dir: Path) -> Path:
    """A run directory of its own, without a report."""
    return Path(shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("report.html")))


class Outline(HTMLParser):
    """Open and closed tags, ids, and everything that could be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "style") or name.startswith("on"):
                self.links.append(f"{name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    parser.close()
    return parser


# ---------------------------------------------------------------------------------------------------------- the page


def test_the_page_is_well_formed_and_fetches_nothing(page: str) -> None:
    found = outline(page)
    assert not found.open
    assert not {"link", "iframe", "object", "embed"} & set(found.tags)
    for link in found.links:
        name, _, value = link.partition("=")
        assert not name.startswith("on"), link
        assert name == "style" or value.startswith(("#", "data:image/png;base64,")), link[:80]
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert set(re.findall(r"https?://[^\"'< ]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_ids_are_unique_so_that_charts_do_not_borrow_each_others_parts(page: str) -> None:
    ids = outline(page).ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def test_every_chart_is_xml_with_a_label_and_hover_titles(page: str) -> None:
    charts = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    # 1 at a glance, 2 of sizes, path, tuning, 5 of noise; once more for a phone: map, 2 of bits, 3 of sensitivity
    assert len(charts) == 10 + 2 * 6
    assert page.count('class="chart slim"') == 6
    for chart in charts:
        root = ElementTree.fromstring(chart)
        assert root.get("aria-label") or root.get("preserveAspectRatio") == "none"  # said beside it
        assert root.get("width") is None
        assert root.find(".//title") is not None or root.find(".//{http://www.w3.org/2000/svg}title") is not None


def test_the_page_shows_every_section_row_and_layer(page: str, space: SearchSpace) -> None:
    text = unescape(re.sub(r"<[^>]*>", "", re.sub(r"<wbr>", "", page)))
    for key, title, _ in SECTIONS:
        assert f'<section id="{key}"' in page
        assert title in text
    for name in (
        "Full precision",
        "One scheme everywhere, next width",
        "Least weight error, same size",
        "One-layer sensitivities",
        "Recipe, A6, corrected",
    ):
        assert name in text
    assert all(name in text for name in space.layer_names)
    assert "is missing in this run" not in text
    assert page.count("<img ") == 12  # four bands of five seeds x three pipelines
    for fact in ("200 images", "101, 102, 103", "20 steps", "Frechet distance, float64", "torch 2.13.0"):
        assert fact in text


def test_hovering_names_every_layer_with_its_scheme(page: str, run_dir: Path) -> None:
    titles = [unescape(t) for t in re.findall(r"<title>(.*?)</title>", page)]
    config = read_json(run_dir / "selection.json")["configs"]["tree"]
    for name, label in config.items():
        bits = label.rsplit("-", 1)[1]
        assert any(t.startswith(f"{name}: ") and f"{bits}\u00a0bits" in t for t in titles)


def test_samples_are_the_pixels_of_the_record(page: str, run_dir: Path) -> None:
    import base64
    import io

    from PIL import Image

    from quantdm.files import load_tensors

    first = re.search(
        r'alt="recipe: samples 11 to 15[^"]*" data-row="recipe" src="data:image/png;base64,([^"]+)"', page
    )
    assert first is not None
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(first[1]))).convert("RGB"))
    images = load_tensors(run_dir / "samples.safetensors")[0]["recipe"]
    for index in range(5):
        tile = sheet[:, index * 9 : index * 9 + 8]
        assert (tile == images[10 + index].permute(1, 2, 0).numpy()).all()


def test_equal_records_give_an_equal_file_and_nothing_else_is_written(page: str, copied: Path, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    path = write_report(copied)
    assert path == copied / "report.html"
    assert path.read_text(encoding="utf-8") == page
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file() and p != path} == before


def test_another_place_can_be_given(copied: Path, tmp_path: Path) -> None:
    for path in copied.iterdir():
        if path.name != "run.json":  # a short page
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    other = write_report(copied, out=tmp_path / "elsewhere" / "page.html")
    assert [p.name for p in other.parent.iterdir()] == ["page.html"]
    assert not (copied / "report.html").exists()


def test_strings_of_records_cannot_become_markup_and_no_directory_is_told(tmp_path: Path, space: SearchSpace) -> None:
    evil = "<img src=x onerror=alert(1)>&\"'"
    folder = make_run(tmp_path / "run", space, model=str(tmp_path / "models" / evil))
    summary = read_json(folder / "summary.json")
    for record in summary["rows"]:
        record["note"] = evil
    summary["versions"][evil] = evil
    summary["protocol"]["fid"] = evil
    write_json(folder / "summary.json", summary)
    selection = read_json(folder / "selection.json")
    selection["candidates"][evil] = selection["candidates"]["tree"]
    write_json(folder / "selection.json", selection)
    surrogate = read_json(folder / "surrogate.json")
    surrogate["without_learning"][evil] = 0.5
    write_json(folder / "surrogate.json", surrogate)
    page = write_report(folder).read_text(encoding="utf-8")
    found = outline(page)
    assert not found.open
    assert not any(link.startswith("on") for link in found.links)
    assert "<img src=x" not in page
    assert page.count("&lt;img src=x") >= 10
    assert str(tmp_path) not in page
    assert "The denoiser of &lt;img src=x" in page


# --------------------------------------------------------------------------------------------------- missing records


@pytest.mark.parametrize(
    ("field", "record", "command", "sections"),
    [
        ("space", "space.json", "quantdm search", {"insights", "sensitivity", "layers", "map", "next", "unknown"}),
        ("trials", "trials", "quantdm search", {"frontier"}),
        ("surrogate", "surrogate.json", "quantdm fit", {"surrogates"}),
        ("attributions", "attribution.json", "quantdm explain", {"insights", "sensitivity", "next", "unknown"}),
        ("selection", "selection.json", "quantdm search", {"frontier"}),
        ("recipe", "recipe.yaml", "quantdm search", {"insights", "layers", "map", "next", "unknown"}),
        ("why", "why.json", "quantdm search", {"why"}),
        ("paths", "paths.json", "quantdm explain", {"paths"}),
        ("correction", "correction.safetensors", "quantdm correct", {"noise"}),
        ("tuning", "tuning.json", "quantdm tune", {"tuning"}),
        ("summary", "summary.json", "quantdm run", {"result", "ablation"}),
        ("samples", "samples.safetensors", "quantdm run", {"samples"}),
    ],
)
def test_a_missing_record_is_named_with_the_command_that_makes_it(
    run_dir: Path, field: str, record: str, command: str, sections: set[str]
) -> None:
    empty: dict[str, object] = {"trials": (), "samples": {}}
    records = replace(read_records(run_dir), **{field: empty.get(field)})  # type: ignore[arg-type]
    for key, _, build in SECTIONS:
        if key in sections:
            html = build(records)
            assert f"<code>{record}</code>" in html
            assert f"<code>{command}" in html
    assert masthead(records).count('class="answer"') == 3


@pytest.mark.parametrize("command", sorted(set(MADE_BY.values())))
def test_the_command_that_makes_a_record_is_one(command: str) -> None:
    words = command.split()
    asked: Any = typer.main.get_command(app).commands[words[1]]  # pyright: ignore
    known = {name for parameter in asked.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
    if words[1] in ("run", "search"):  # what starts a run is refused without a size
        assert {"--target-bits", "--pipeline-size"} & set(words)


def test_the_size_of_the_whole_export_is_told_where_there_is_one(run_dir: Path) -> None:
    records = read_records(run_dir)
    assert "With all other parts" not in how_small(records).sentence
    told = how_small(replace(records, export_bytes=5_000_000)).sentence
    assert told.endswith("With all other parts the export takes 5.00\xa0MB.")


def test_a_run_without_any_record_still_gives_a_page(copied: Path) -> None:
    for path in copied.iterdir():
        if path.name != "run.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = write_report(copied).read_text(encoding="utf-8")
    assert page.count('class="missing') == len(SECTIONS) - 2  # the protocol needs no record
    assert f"{len(SECTIONS) - 2} sections and the commands that make them" in page
    assert page.count("<section ") == 3  # the protocol, what can be taken along, and what is not there


def test_no_run_is_an_error_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(QuantDMError, match="no run in"):
        write_report(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def damage_json(folder: Path) -> None:
    (folder / "surrogate.json").write_text("{")


def damage_version(folder: Path) -> None:
    write_json(folder / "summary.json", {"version": 99})


def damage_samples(folder: Path) -> None:
    save_tensors(folder / "samples.safetensors", {"fp": torch.zeros(4, 3, 8, 8)})


def damage_layers(folder: Path) -> None:
    record = read_json(folder / "attribution.json")
    record["attributions"]["tree"]["layers"][0] = "another.layer"
    write_json(folder / "attribution.json", record)


def damage_recipe(folder: Path) -> None:
    text = Recipe(model="another", layers={"another.layer": "uniform-channel-4"}).to_yaml()
    (folder / "recipe.yaml").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_json, "surrogate.json: not a JSON file"),
        (damage_version, "summary.json: got version 99"),
        (damage_samples, "expected uint8"),
        (damage_layers, "tree explains other layers"),
        (damage_recipe, "is for another model"),
    ],
)
def test_a_damaged_or_foreign_record_is_one_clear_error(copied: Path, damage, message: str) -> None:
    damage(copied)
    with pytest.raises(QuantDMError, match=message):
        write_report(copied)
    assert not (copied / "report.html").exists()


def test_importing_the_report_loads_no_plotting_library() -> None:
    code = "import sys, json, quantdm.report; print(json.dumps('matplotlib' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) is False
