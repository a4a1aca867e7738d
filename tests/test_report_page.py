"""The page as its readers meet it: structure, contrast in both themes, two runs beside each other, the command."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from quantdm.allocation.sampling import sample_configs
from quantdm.cli.main import app
from quantdm.errors import QuantDMError
from quantdm.files import read_json, write_json
from quantdm.report import write_comparison, write_report
from quantdm.report.data import report_data
from quantdm.report.figures import FAINT, INK, MUTED, RECIPE, RULE
from quantdm.report.glance import answers
from quantdm.report.page import SCRIPTS, STYLES
from quantdm.report.paste import markdown
from quantdm.report.plot import Scale, around
from quantdm.report.records import read_records
from quantdm.report.sizes import fit_curve, front, other_sizes, read_values
from quantdm.report.theme import mirrored, themed, variables
from quantdm.runs.explain import leading, load_attributions
from quantdm.runs.resize import select_recipe
from quantdm.runs.run import Run
from tests.report_run import ROWS, make_run, make_space, row

ROOM = Path(__file__).resolve().parents[1] / "quantdm" / "report"
STYLE = "\n".join((ROOM / name).read_text(encoding="utf-8") for name in STYLES)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("page") / "run", make_space())


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory, run_dir) -> Path:
    """The same run, with another recipe and another size."""
    folder = Path(shutil.copytree(run_dir, tmp_path_factory.mktemp("other") / "other"))
    select_recipe(Run.open(folder), target_bits=4.0, by="tree").save(folder / "new.yaml")
    (folder / "recipe.yaml").unlink()
    (folder / "new.yaml").rename(folder / "recipe.yaml")
    summary = read_json(folder / "summary.json")
    summary["rows"] = [row("recipe", 0.01, 0.001, bits=4.0) if r["name"] == "recipe" else r for r in summary["rows"]]
    write_json(folder / "summary.json", summary)
    return folder


@pytest.fixture(scope="module")
def pages(run_dir, other_dir, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    bare = Path(shutil.copytree(run_dir, folder / "bare"))
    for path in bare.iterdir():
        if path.name not in ("run.json", "space.json", "trials"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    made = {
        "run": write_report(run_dir),
        "search only": write_report(bare),
        "two runs": write_comparison(run_dir, other_dir, out=folder / "two.html"),
    }
    return {name: path.read_text(encoding="utf-8") for name, path in made.items()}


class Parts(HTMLParser):
    """Every element with its attributes, headings with their level, and the text inside labels and buttons."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.inside: list[str] = []
        self.named: dict[int, str] = {}  # index of a button, link or summary -> its text
        self._open: list[tuple[str, int]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag in ("button", "a", "summary", "label"):
            self._open.append((tag, len(self.elements) - 1))
            self.named[len(self.elements) - 1] = ""

    def handle_endtag(self, tag) -> None:
        if self._open and self._open[-1][0] == tag:
            self._open.pop()

    def handle_data(self, data) -> None:
        for _, index in self._open:
            self.named[index] += data

    def all(self, *tags: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


PAGES = ["run", "search only", "two runs"]


@pytest.mark.parametrize("name", PAGES)
def test_ids_are_unique_and_links_resolve(pages, name) -> None:
    parts = Parts(pages[name])
    ids = [a["id"] for _, a in parts.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in parts.elements:
        for key in ("href", "for", "aria-labelledby"):
            if key in attributes and tag != "use":
                assert attributes[key].removeprefix("#") in ids, (tag, attributes)


@pytest.mark.parametrize("name", PAGES)
def test_headings_go_down_one_by_one_and_landmarks_are_there(pages, name) -> None:
    parts = Parts(pages[name])
    levels = [int(tag[1]) for tag, _ in parts.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels)), levels
    for landmark in ("header", "nav", "main", "footer"):
        assert len(parts.all(landmark)) == 1
    assert parts.all("html")[0]["lang"] == "en"


@pytest.mark.parametrize("name", PAGES)
def test_everything_that_can_be_used_or_seen_has_a_name(pages, name) -> None:
    parts = Parts(pages[name])
    labels = {a["for"] for a in parts.all("label") if "for" in a}
    for index, text in parts.named.items():
        assert text.strip() or parts.elements[index][1].get("aria-label"), parts.elements[index]
    for attributes in parts.all("input"):
        assert attributes.get("aria-label") or attributes.get("id") in labels
    for attributes in parts.all("img"):
        assert attributes["alt"]
    for attributes in parts.all("svg"):
        assert attributes.get("aria-label") or "preserveaspectratio" in attributes  # hidden, said beside it
    for attributes in parts.all("div"):
        if attributes.get("class") == "scroll":
            assert attributes["tabindex"] == "0"
            assert attributes["aria-label"]


@pytest.mark.parametrize("name", PAGES)
def test_every_picture_inside_decodes(pages, name) -> None:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', pages[name])
    assert bool(found) == (name != "search only")
    for source in found:
        Image.open(io.BytesIO(base64.b64decode(source, validate=True))).load()


@pytest.mark.parametrize("name", PAGES)
def test_only_the_pages_own_script_may_run_and_nothing_is_fetched(pages, name) -> None:
    import hashlib

    page = pages[name]
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert scripts == ["\n".join((ROOM / name).read_text(encoding="utf-8") for name in SCRIPTS)]
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page
    for word in ("fetch(", "XMLHttpRequest", "import(", "eval(", "innerHTML", "setInterval"):
        assert word not in scripts[0]


def test_scripts_and_styles_stay_small() -> None:
    for name in (*SCRIPTS, *STYLES):
        assert len((ROOM / name).read_text(encoding="utf-8").splitlines()) <= 300


# ----------------------------------------------------------------------------------------------------------- contrast


def themes() -> dict[str, dict[str, str]]:
    """The colours that the style sheet names, in both themes."""
    light, dark = (
        re.search(r":root \{(.*?)\}", STYLE, re.DOTALL),
        re.search(r"dark\) \{ :root \{(.*?)\}", STYLE, re.DOTALL),
    )
    assert light is not None
    assert dark is not None
    found = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part[1])) for part in (light, dark)]
    assert set(found[0]) == set(found[1])
    return {"light": found[0], "dark": found[1]}


def contrast(one: str, two: str) -> float:
    """The contrast ratio of WCAG 2.2."""

    def luminance(hue: str) -> float:
        parts = np.array([int(hue[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_counted_as_the_guidelines_do() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast_on_every_ground_that_it_stands_on(theme) -> None:
    hues = themes()[theme]
    for text in ("ink", "muted", "recipe"):
        for ground in ("paper", "wash", "recipe-wash"):
            assert contrast(hues[text], hues[ground]) >= 4.5, (text, ground)
    assert contrast(hues["on-recipe"], hues["recipe"]) >= 4.5
    for mark in ("line", "baseline", "recipe"):  # what has to be seen to understand a picture or find a control
        assert contrast(hues[mark], hues["paper"]) >= 3, mark


def test_drawings_follow_the_theme() -> None:
    hues = themes()["light"]
    named = {"ink": INK, "faint": FAINT, "rule": RULE, "recipe": RECIPE}
    assert {key: hues[key] for key in named} == named  # a drawing outside of a page looks the same
    drawn = themed(f'<path style="stroke: {INK}; fill: #1f5f99"/><path fill="{MUTED}"/><a href="#123456"/>')
    assert drawn.startswith('<path style="stroke: var(--ink); fill: var(--x1f5f99)"/><path fill="var(--muted)"/>')
    assert '"#123456"' not in drawn or 'href="#123456"' in drawn
    rules = variables(drawn)
    assert "--x1f5f99:#1f5f99;}" in rules
    assert f"--x1f5f99:{mirrored('#1f5f99')};" in rules
    assert contrast(mirrored("#1c2530"), themes()["dark"]["paper"]) > 7  # dark ink becomes light
    assert contrast(mirrored("#ffffff"), themes()["dark"]["paper"]) < 1.3  # white becomes the ground


# ------------------------------------------------------------------------------------------------------- what it says


def said(run_dir: Path) -> dict[str, str]:
    return {answer.question: answer.sentence for answer in answers(read_records(run_dir))}


def test_three_answers_stand_first_and_come_from_the_record(run_dir, pages) -> None:
    found = said(run_dir)
    assert "shrinks from 1.60\u00a0MB to 300\u00a0kB" in found["How small?"]
    assert "3.0 times nearer than the best uniform scheme of 6.7\u00a0% more bytes" in found["How good?"]
    assert "attn1.to_v hurts most" in found["Why these bits?"]
    head = pages["run"].partition("</header>")[0]
    assert head.count('class="answer"') == 3


@pytest.mark.parametrize(
    ("fid", "sd", "words"),
    [(0.059, 0.003, "no better than the best uniform scheme"), (0.09, 0.003, "worse than the best uniform scheme"),
     (0.03, 0.001, "but no better than sensitivities alone beyond noise")],
)  # fmt: skip
def test_it_is_said_above_the_fold_when_the_recipe_does_not_win(run_dir, tmp_path, fid, sd, words) -> None:
    folder = Path(shutil.copytree(run_dir, tmp_path / "run"))
    summary = read_json(folder / "summary.json")
    summary["rows"] = [row("recipe", fid, sd) if r["name"] == "recipe" else r for r in ROWS]
    write_json(folder / "summary.json", summary)
    assert words in said(folder)["How good?"]


def test_a_run_that_only_searched_says_what_it_knows(pages) -> None:
    page = pages["search only"]
    assert "No recipe is chosen yet" in page
    assert "Not known yet" in page
    assert "Not in this run yet" in page
    assert '<section id="frontier"' in page
    assert '<section id="samples"' not in page
    assert "quantized, alone" in page  # what the rest weighs in the file is not known yet
    assert "on disk" not in page.partition("predicted sizes")[2].partition("</table>")[0]


def test_other_sizes_fall_with_every_bit_and_hold_what_was_planted(run_dir) -> None:
    records = read_records(run_dir)
    space, reading, sizes = records.space, read_values(records), other_sizes(records)
    assert space is not None
    assert reading is not None
    assert len(sizes) > 5
    assert all(a.bits < b.bits and a.fid >= b.fid and a.denoiser_bytes < b.denoiser_bytes
               for a, b in pairwise(sizes))  # fmt: skip
    assert all(s.low < s.fid < s.high for s in sizes)
    fresh = sample_configs(space, 60, seed=5)  # no trial is one of them
    truth = 0.1 * space.gather(space.noise_error, fresh).sum(axis=1)
    inside = [reading.fid(c, -2) <= t <= reading.fid(c, 2) for c, t in zip(fresh, truth, strict=True)]
    assert np.mean(inside) > 0.9
    recipe = records.rows["recipe"]
    rest = recipe["denoiser_bytes"] - round(recipe["avg_bits"] * int(space.num_weights.sum()) / 8)
    assert sizes[0].denoiser_bytes == rest + int(sizes[0].bits * space.num_weights.sum() / 8 + 1e-6)


def test_what_won_the_verification_counts_most_and_else_what_ranks_best() -> None:
    names, folds = ("additive", "tree", "graph"), {"additive": [0.9, 0.7], "tree": [0.8, 0.9], "graph": [0.8, 0.8]}
    surrogate = {"held_out_spearman": folds}
    assert leading(names, {"chosen": "additive"}, surrogate) == "additive"
    assert leading(names, {"chosen": "best sampled"}, surrogate) == "tree"
    assert leading(names, {"chosen": "lambda mode"}, surrogate) == "graph"
    assert leading(names, None, surrogate) == "tree"
    assert leading((*names, "sensitivity"), {"chosen": "sensitivity"}, surrogate) == "sensitivity"
    assert leading(names, None, None) in names


def test_another_size_is_chosen_by_what_counts_most_in_the_run(run_dir) -> None:
    run = Run.open(run_dir)
    best = leading(load_attributions(run), read_json(run.path("selection.json")), None)
    said = select_recipe(run, target_bits=4.0).provenance.source
    assert said == select_recipe(run, target_bits=4.0, by=best).provenance.source
    assert best in said


def test_an_explanation_that_saturates_makes_no_flat_prediction() -> None:
    """Distances that go on falling where values hardly grow: a line would be off by far, the curve is not."""
    total = np.concatenate([np.linspace(-30, 0, 40), np.linspace(0, 1, 160)])
    y = np.where(total < 0, 5 + total / 10, 5 + 2 * total)
    curve = fit_curve(total, y)
    assert curve is not None
    assert np.abs(curve(total) - y).mean() < 0.1
    assert (np.diff(curve(np.linspace(-35, 2, 200))) >= 0).all()
    assert curve(1.0) - curve(0.0) > 1.5
    assert fit_curve(total, -y) is None


def test_the_front_is_what_no_trial_beats() -> None:
    points = np.random.default_rng(0).uniform(size=(60, 2))
    found = front(points)
    beaten = [p for p in points.tolist() if any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points.tolist())]
    assert sorted(map(list, found)) == sorted(p for p in points.tolist() if p not in beaten)


def test_scales_have_round_ticks_and_keep_their_ends() -> None:
    linear, decades = Scale(0.13, 0.87, 0, 100), Scale(0.01, 100, 0, 100, log=True)
    assert linear.ticks() == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert decades.ticks() == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert (linear(0.13), linear(0.87), linear(9), decades(1), decades(-1)) == pytest.approx((0, 100, 100, 50, 0))
    assert around([1.0, 1.0])[0] < 1 < around([1.0, 1.0])[1]


def test_all_data_are_inside_and_equal_what_the_command_prints(run_dir, pages) -> None:
    inside = re.search(r'<script type="application/json" id="data">(.*?)</script>', pages["run"], re.DOTALL)
    assert inside is not None
    found = json.loads(inside[1])
    assert found == json.loads(json.dumps(report_data(read_records(run_dir))))
    printed = CliRunner().invoke(app, ["report", str(run_dir), "--json"])
    assert json.loads(printed.stdout) == found
    assert len(found["layers"]) == len(make_space().layers)
    assert len(found["trials"]) == len(make_space().options) + 15
    assert found["correction"]["measured"]["k"] == [0.3, 0.4]


def test_the_markdown_is_a_table_of_all_rows(run_dir) -> None:
    lines = markdown(read_records(run_dir)).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == len(ROWS) + 2
    assert len({line.count("|") for line in rows}) == 1
    assert sum("**How" in line or "**Why" in line for line in lines) == 3


# ------------------------------------------------------------------------------------------------------------ two runs


def test_two_runs_are_set_against_each_other(pages, run_dir, other_dir) -> None:
    page = re.sub(r"<[^>]*>", "", pages["two runs"].replace("<wbr>", ""))
    assert "other) is nearer to full precision: fid_fp 0.0200" in page
    assert "Both were measured by the same protocol" in page
    assert re.search(r"In \d+ of \d+ layers", page)
    assert pages["two runs"].count("<img ") == 12  # full precision, one, two: equal seeds


def test_figures_of_different_protocols_are_not_compared(run_dir, other_dir, tmp_path) -> None:
    folder = Path(shutil.copytree(other_dir, tmp_path / "third"))
    summary = read_json(folder / "summary.json")
    summary["protocol"]["images"] = 17
    write_json(folder / "summary.json", summary)
    page = write_comparison(run_dir, folder, out=tmp_path / "two.html").read_text(encoding="utf-8")
    assert "Their figures are not comparable: images: 200 and 17." in page


def test_a_comparison_with_a_run_that_only_searched_still_stands(run_dir, tmp_path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(run_dir / "run.json", folder)
    page = write_comparison(run_dir, folder, out=tmp_path / "two.html").read_text(encoding="utf-8")
    assert "One of the runs has no samples." in page


def test_the_command_tells_the_answers_and_takes_one_or_two_runs(run_dir, other_dir, tmp_path) -> None:
    told = CliRunner().invoke(app, ["report", str(run_dir), "-o", str(tmp_path / "one.html")])
    assert told.exit_code == 0, told.output
    for question in ("How small?", "How good?", "Why these bits?"):
        assert question in told.stdout
    assert max(map(len, told.stdout.partition("report:")[0].splitlines())) <= 79
    told = CliRunner().invoke(app, ["report", str(run_dir), str(other_dir), "-o", str(tmp_path / "two.html")])
    assert told.stdout.startswith("comparison: ")
    for arguments in ([], [str(run_dir)] * 3):
        with pytest.raises(QuantDMError, match="expected one, or two to compare"):
            CliRunner().invoke(app, ["report", *arguments], catch_exceptions=False)
