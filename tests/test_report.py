"""The report: self-contained, complete, honest about missing records and about a recipe that does not win."""

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

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel

from quantdm.correction.record import Correction
from quantdm.denoisers.graph import trace_graph
from quantdm.denoisers.layers import list_layers
from quantdm.denoisers.protocol import load_protocol
from quantdm.errors import QuantDMError
from quantdm.files import read_json, save_tensors, write_json
from quantdm.quantizers import count_bits
from quantdm.recipe import Provenance, Recipe
from quantdm.report import write_report
from quantdm.report.insights import (
    group_layers,
    headline,
    insights,
    least_error,
    megabytes,
    one_more_bit,
    plus_minus,
    verdict,
)
from quantdm.report.page import SECTIONS
from quantdm.report.records import read_records
from quantdm.report.sections import masthead
from quantdm.schemes import DEFAULT_OPTIONS
from quantdm.search.run import Run, RunSettings
from quantdm.search.sampling import sample_configs
from quantdm.search.store import TrialStore
from quantdm.surrogates import SearchSpace, select
from quantdm.surrogates.attribution import summarise

SENSITIVE = "attn1.to_v"  # planted: this operation type suffers most
VOID = {"meta", "img", "br", "wbr", "link", "input", "hr"}


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    """A small real DiT: two blocks, planted one-layer noise errors."""
    denoiser = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2
    )
    layers, rng = list_layers(denoiser), np.random.default_rng(0)
    base = np.array([0.4 if layer.op_type == SENSITIVE else 0.02 for layer in layers]) * rng.lognormal(
        0, 0.2, len(layers)
    )
    noise = base[:, None] * np.array([4.0 ** (2 - option.bits) for option in DEFAULT_OPTIONS])
    noise *= rng.lognormal(0, 0.1, noise.shape)
    bits = np.array([[count_bits(layer.shape, o, layer.split) for o in DEFAULT_OPTIONS] for layer in layers])
    return SearchSpace(layers, trace_graph(denoiser), DEFAULT_OPTIONS, bits, 0.3 * noise, noise)


def row(name: str, fid: float, sd: float, bits: float = 3.0, note: str = "measured") -> dict:
    """One row of a result table."""
    return {
        "name": name,
        "note": note,
        "avg_bits": bits,
        "denoiser_bytes": round(bits * 1e5),
        "fid_fp": fid,
        "fid_fp_sd": sd,
        "fid_real": 0.2,
        "fid_real_sd": 0.01,
        "psnr_fp": None if name == "fp" else 20.0,
        "agreement": 0.99,
        "seconds": 9.0,
    }


ROWS = [
    row("fp", 0.0, 0.0, bits=16.0),
    row("uniform-w4", 0.01, 0.001, bits=4.2),
    row("uniform-same-size", 0.06, 0.003, bits=3.2, note="kmeans-channel-3"),
    row("sensitivity-same-size", 0.03, 0.002),
    row("recipe", 0.02, 0.001),
    row("recipe+a6", 0.05, 0.004),
    row("recipe+a6+correction", 0.03, 0.002),
]


def make_run(folder: Path, space: SearchSpace, *, model: str = "digits-dit") -> Path:
    """Write every record of a finished run."""
    rng = np.random.default_rng(1)
    settings = RunSettings(
        model=model, fingerprint="0123456789abcdef", options=space.labels, target_bits=3.2, trials=24, seed=0,
        protocol=load_protocol("digits-dit"), label_images=100, label_steps=6, verify_images=200, noise_images=4,
        dtype="float32",
    )  # fmt: skip
    run = Run.create(folder, settings)
    space.save(run.path("space.json"))
    anchors = np.tile(np.arange(len(space.options))[:, None], (1, len(space.layers)))
    choices = np.concatenate([anchors, sample_configs(space, 15, seed=0)])
    fids = 0.1 * space.gather(space.noise_error, choices).sum(axis=1) * rng.lognormal(0, 0.1, len(choices))
    store = TrialStore(run.path("trials"))
    for index, (choice, fid) in enumerate(zip(choices, fids, strict=True)):
        bits = float(space.avg_bits(choice)[0])
        store.put(f"{index:016d}", {"config": space.config(choice).to_labels(), "avg_bits": bits, "fid_fp": float(fid)})
    folds = {name: rng.uniform(0.8, 0.95, 5).tolist() for name in ("additive", "tree", "graph")}
    null = {"average bits": 0.7, "sum of noise errors": 0.8, "sum of weight errors": 0.75}
    write_json(
        run.path("surrogate.json"), {"version": 1, "trials": 24, "held_out_spearman": folds, "without_learning": null}
    )
    found = {
        name: summarise(name, space, -space.noise_error * rng.lognormal(0, 0.1), space.noise_error) for name in folds
    }
    write_json(run.path("attribution.json"), {"version": 1, "attributions": {n: a.to_dict() for n, a in found.items()}})
    picks = {name: select(space, a.values, target_bits=3.2) for name, a in found.items()}
    picks["baseline: kmeans-channel-3"] = anchors[space.labels.index("kmeans-channel-3")]
    candidates = {
        name: {"avg_bits": float(space.avg_bits(c)[0]), "fid_fp_mean": 0.02, "fid_fp_sd": 0.001, "psnr_fp_mean": 20.0}
        for name, c in picks.items()
    }
    configs = {name: space.config(c).to_labels() for name, c in picks.items()}
    write_json(
        run.path("selection.json"), {"version": 1, "chosen": "tree", "candidates": candidates, "configs": configs}
    )
    provenance = Provenance(source="measured: tree", seed=0, trials=24)
    Recipe(model=model, layers=configs["tree"], avg_bits=candidates["tree"]["avg_bits"], provenance=provenance).save(
        run.path("recipe.yaml")
    )
    protocol = {"images": 200, "draws": [101, 102, 103], "steps": 20, "guidance_scale": 1.5, "features": "digits",
                "scheduler": "the pipeline's own", "fid": "Frechet distance, float64", "dtype": "float32"}  # fmt: skip
    write_json(
        run.path("summary.json"),
        {"version": 1, "model": model, "versions": {"torch": "2.13.0"}, "protocol": protocol, "fid_floor": 0.04,
         "fp_noise": {"mean": 0.02, "sd": 0.001}, "rows": ROWS},
    )  # fmt: skip
    names = ("fp", "uniform-same-size", "recipe")
    generator = torch.Generator().manual_seed(0)
    images = {n: torch.randint(0, 256, (20, 3, 8, 8), generator=generator, dtype=torch.uint8) for n in names}
    save_tensors(run.path("samples.safetensors"), images)
    steps = np.arange(951, 0, -190)
    level = np.linspace(-5, 5, len(steps))
    Correction(
        timesteps=steps, log_snr=level, k=0.1 * np.exp(-(level**2)), bias=np.zeros((len(steps), 4)),
        shift=np.zeros((len(steps), 4)), q=0.1 + 0 * level, variant="k", model=model,
        diagnostics={"r2": 0.2 + 0 * level, "lag1": 0.1 + 0 * level}, measured={"none": [0.5, 0.6], "k": [0.3, 0.4]},
    ).save(run.path("correction.safetensors"))  # fmt: skip
    return folder


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
    assert not {"script", "link", "iframe", "object"} & set(found.tags)
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
    assert len(charts) == 8
    for chart in charts:
        root = ElementTree.fromstring(chart)
        assert root.get("aria-label")
        assert root.get("width") is None
        assert root.find(".//{http://www.w3.org/2000/svg}title") is not None or "per sampling step" in chart


def test_the_page_shows_every_section_row_and_layer(page: str, space: SearchSpace) -> None:
    text = unescape(re.sub(r"<[^>]*>", "", re.sub(r"<wbr>", "", page)))
    for key, title, _ in SECTIONS:
        assert f'<section id="{key}">' in page
        assert title in text
    for name in ("Full precision", "Best uniform, same size", "One-layer sensitivities", "Recipe, A6, corrected"):
        assert name in text
    assert all(name in text for name in space.layer_names)
    assert "is missing in this run" not in text
    assert page.count("<img ") == 6  # two bands of ten seeds x three pipelines
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

    first = re.search(r'alt="recipe: samples 11 to 20" src="data:image/png;base64,([^"]+)"', page)
    assert first is not None
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(first[1]))))
    images = load_tensors(run_dir / "samples.safetensors")[0]["recipe"]
    for index in range(10):
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
        ("space", "space.json", "quantdm search", {"insights", "sensitivity", "layers", "next"}),
        ("trials", "trials", "quantdm search", {"frontier"}),
        ("surrogate", "surrogate.json", "quantdm fit", {"surrogates"}),
        ("attributions", "attribution.json", "quantdm explain", {"insights", "sensitivity", "next"}),
        ("selection", "selection.json", "quantdm search", {"frontier"}),
        ("recipe", "recipe.yaml", "quantdm search", {"insights", "layers", "next"}),
        ("correction", "correction.safetensors", "quantdm correct", {"noise"}),
        ("summary", "summary.json", "quantdm demo", {"result"}),
        ("samples", "samples.safetensors", "quantdm demo", {"samples"}),
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
    assert (field == "summary") == ('class="missing"' in masthead(records))


def test_a_run_without_any_record_still_gives_a_page(copied: Path) -> None:
    for path in copied.iterdir():
        if path.name != "run.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = write_report(copied).read_text(encoding="utf-8")
    assert page.count('class="missing"') == len(SECTIONS)  # the protocol needs no record, the masthead does


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
    Recipe(model="another", layers={"another.layer": "uniform-channel-4"}).save(folder / "recipe.yaml")


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


# ---------------------------------------------------------------------------------------------------------- insights


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [((0.02, 0.001), (0.06, 0.003), "better"), ((0.06, 0.003), (0.02, 0.001), "worse"),
     ((0.02, 0.02), (0.05, 0.001), "tie"), ((0.05, 0.0), (0.05, 0.0), "tie")],
)  # fmt: skip
def test_a_difference_counts_beyond_two_standard_deviations(ours, theirs, expected: str) -> None:
    assert verdict(row("a", *ours), row("b", *theirs)) == expected


@pytest.mark.parametrize(
    ("recipe", "phrase"),
    [((0.02, 0.001), "3.0 times lower"), ((0.059, 0.003), "not measurably better"), ((0.09, 0.003), "does not win")],
)
def test_the_headline_says_it_when_the_recipe_does_not_win(recipe, phrase: str) -> None:
    rows = {r["name"]: r for r in ROWS} | {"recipe": row("recipe", *recipe)}
    first, *others = headline("some-model", rows)
    assert phrase in first
    assert "1.60\u00a0MB" in first
    assert "300\u00a0kB" in first
    assert "of 6.7\u00a0% more bytes (k-means per channel, 3\u00a0bits everywhere)" in first
    rows["uniform-same-size"] = row("uniform-same-size", 0.06, 0.003, note="least weight error")
    assert "of the same size (least weight error)" in headline("some-model", rows)[0]
    assert len(others) == 2
    assert "the correction of the sampler lowers it to 0.0300" in others[1]
    rows["recipe+a6+correction"] = rows["recipe+a6"]
    assert "none is in use" in headline("some-model", rows)[2]


def test_one_more_bit_is_the_best_wider_option_per_bit_by_brute_force(space: SearchSpace) -> None:
    values = -space.noise_error
    choice = np.zeros(len(space.layers), dtype=np.int64)  # 2 bits everywhere
    found = one_more_bit(space, values, choice, top=3)
    best = {}
    for position, layer in enumerate(space.layers):
        for option, scheme in enumerate(space.options):
            extra = space.bits[position, option] - space.bits[position, 0]
            if scheme.bits > 2 and extra > 0:
                rate = (values[position, option] - values[position, 0]) / extra
                best[layer.name] = max(best.get(layer.name, -np.inf), rate)
    ranked = sorted(best, key=lambda name: -best[name])[:3]
    assert [step.layer for step in found] == ranked
    assert [step.per_bit for step in found] == pytest.approx([best[name] for name in ranked])


def test_nothing_is_to_be_bought_when_all_layers_are_widest(space: SearchSpace) -> None:
    values = -space.noise_error.copy()
    values[:, space.labels.index("kmeans-channel-4")] = 1.0  # worth more and larger, but no wider
    widest = np.full(len(space.layers), space.labels.index("uniform-channel-4"))
    assert one_more_bit(space, values, widest) == []
    assert insights(space, widest, values)[2].startswith("Spend nothing more")


def test_insights_name_the_planted_effects(space: SearchSpace) -> None:
    choice = np.where([layer.op_type == "ff.net.2" for layer in space.layers], 0, 2)  # uniform: 2 bits, else 4
    values = -space.noise_error.copy()
    target = space.layer_index["transformer_blocks.1.ff.net.2"]
    values[target, 1:] += 1000.0  # any wider option of this layer is worth most
    protect, save, spend = insights(space, choice, values)
    assert protect.startswith(f"Protect {SENSITIVE}: ")
    assert save.startswith("Save in ff.net.2: ")
    assert "The 2 of 21 layers" in save
    assert "Spend the next bits on transformer_blocks.1.ff.net.2: going from uniform per channel, 2" in spend


def test_groups_partition_the_layers_and_their_shares_add_up(space: SearchSpace) -> None:
    choice = np.arange(len(space.layers)) % len(space.options)
    for by in ("op_type", "block"):
        groups = group_layers(space, by, choice)
        assert sorted(np.concatenate([g.members for g in groups])) == list(range(len(space.layers)))
        assert sum(g.weight_share for g in groups) == pytest.approx(1)
        assert sum(g.bit_share or 0 for g in groups) == pytest.approx(1)
        mean = sum((g.avg_bits or 0) * g.weight_share for g in groups)
        assert mean == pytest.approx(float(space.avg_bits(choice)[0]))


def test_least_error_takes_the_best_method_of_a_width(space: SearchSpace) -> None:
    three = [i for i, option in enumerate(space.options) if option.bits == 3]
    assert (least_error(space, 3) == np.min([space.noise_error[:, i] for i in three], axis=0)).all()


@pytest.mark.parametrize(
    ("count", "text"),
    [(12, "12 bytes"), (1510, "1.51 kB"), (6.74e6, "6.74 MB"), (250e6, "250 MB"), (5.13e9, "5.13 GB")],
)
def test_bytes_read_in_the_unit_that_fits(count: float, text: str) -> None:
    assert megabytes(count).replace("\u00a0", " ") == text


@pytest.mark.parametrize(
    ("mean", "sd", "text"), [(0.04532, 0.00312, "0.0453 ± 0.0031"), (12.34, 1.2, "12.3 ± 1.2"), (0.5, 0.0, "0.5000")]
)
def test_figures_show_two_digits_of_their_spread(mean: float, sd: float, text: str) -> None:
    assert plus_minus({"fid_fp": mean, "fid_fp_sd": sd}).replace("\u00a0", " ") == text


def test_importing_the_report_loads_no_plotting_library() -> None:
    code = "import sys, json, quantdm.report; print(json.dumps('matplotlib' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) is False
