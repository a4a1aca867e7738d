"""Nothing of a user's is lost: a writer replaces only what quantdm provably wrote, and only by something whole."""

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from quantdm import QuantDMError, Recipe, export_pipeline, get_denoiser, load_pipeline, load_recipe, trace_graph
from quantdm.cli.images import generate_grid
from quantdm.cli.main import app
from quantdm.corridor.demo import demo
from quantdm.corridor.levels import LEVELS
from quantdm.files import YAML_COMMENT, atomic_path, check_output, replace_folder, save_tensors, write_json, write_text
from quantdm.hub.export import check_export_path
from quantdm.hub.model_card import write_card
from quantdm.hub.replace import why_no_export
from quantdm.pipelines.subject import look_at
from quantdm.report import write_report
from quantdm.report.drawing import draw_graph
from quantdm.report.insight_files import save_insights
from quantdm.runs.run import Run
from quantdm.runs.search import start_run
from quantdm.runs.store import TrialStore
from tests.report_run import make_run, make_space

RECIPE = Recipe(model="digits-dit", default="uniform-channel-4")


def snapshot(folder):
    """Every file below a folder with its bytes, and every link with its target."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """An export with its card."""
    folder = export_pipeline("digits-dit", RECIPE, tmp_path_factory.mktemp("export") / "small")
    write_card(folder)
    return folder


@pytest.fixture
def small(export, tmp_path):
    """A copy of the export that a test may spoil."""
    return Path(shutil.copytree(export, tmp_path / "small"))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run directory with every record, planted."""
    return make_run(tmp_path_factory.mktemp("runs") / "run", make_space())


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of the run that a test may spoil."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


# ------------------------------------------------------------------------------------------------------------ exports

FOREIGN = {
    "run.json": "{}",
    "notes.txt": "mine",
    "transformer/notes.txt": "mine",
    "transformer/deeper/config.json": "{}",
    "bank/index.json": "{}",
    "README.md": "# Written by hand",
    "correction.safetensors": "mine",
    ".git": "mine",
    "recipe.yaml": "# a comment of mine\nmodel: digits-dit\ndefault: uniform-channel-4\n",
    "model_index.json": "{}",
    "transformer/config.json": "{}",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_with_anything_of_others_is_no_export(small, name):
    assert why_no_export(small) is None
    (small / name).parent.mkdir(exist_ok=True)
    (small / name).write_text(FOREIGN[name])
    before = snapshot(small)
    with pytest.raises(QuantDMError, match=r"exists and is no export of quantdm: .*choose another"):
        export_pipeline("digits-dit", RECIPE, small)
    assert snapshot(small) == before


@pytest.mark.parametrize("name", ["model_index.json", "recipe.yaml"])
def test_a_folder_that_lacks_what_every_export_has_is_no_export(small, name):
    (small / name).unlink()
    with pytest.raises(QuantDMError, match=f"no export of quantdm: it has no {name}"):
        check_export_path(small, "digits-dit")


def test_a_folder_with_a_link_in_it_is_no_export(small, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.rmtree(small / "vae")
    (small / "vae").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(QuantDMError, match="it holds vae"):
        check_export_path(small, "digits-dit")


def test_an_export_is_replaced_also_behind_a_link(small, tmp_path):
    (tmp_path / "latest").symlink_to(small)
    wider = Recipe(model="digits-dit", default="uniform-channel-6")
    export_pipeline("digits-dit", wider, tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert load_recipe(small / "recipe.yaml").default == "uniform-channel-6"
    assert not (small / "README.md").exists()  # the card was of the old one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "small"]


@pytest.mark.parametrize("out", ["R", "R/bank", "R/trials", "."])
def test_a_run_directory_is_never_replaced(run, out):
    (run / "bank").mkdir()
    (run / "bank" / "index.json").write_text("{}")
    before = snapshot(run)
    place = run.parent if out == "." else run / out.removeprefix("R").lstrip("/")
    result = CliRunner().invoke(app, ["export", "--run-dir", str(run), "-o", str(place)])
    assert isinstance(result.exception, QuantDMError)
    assert "export: " in str(result.exception)
    assert snapshot(run) == before


def test_a_model_is_not_overwritten_by_its_own_export(tmp_path):
    source = tmp_path / "models" / "mine"
    load_pipeline("digits-dit").save_pretrained(source)
    before = snapshot(tmp_path)
    (tmp_path / "link").symlink_to(source)
    for out in (
        source,
        source / "small",
        source / "vae",
        tmp_path / "models",
        tmp_path / "link",
        tmp_path / "link" / "x",
    ):
        with pytest.raises(QuantDMError, match="overlaps with the model's own folder"):
            export_pipeline(source, RECIPE, out)
    (tmp_path / "link").unlink()
    assert snapshot(tmp_path) == before


def test_a_failed_move_leaves_the_old_folder(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("precious")
    with pytest.raises(QuantDMError, match="cannot be written"):
        replace_folder(tmp_path / "missing", tmp_path / "old")
    assert snapshot(tmp_path) == {"old/file": b"precious"}
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").write_text("new")
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert snapshot(tmp_path) == {"old/file": b"new"}


# ------------------------------------------------------------------------------------------------------ single files


def write_grid(path):
    generate_grid("digits-dit", path, images=1, seed=0, steps=1, protocol=None, columns=10)


WRITERS = {
    "recipe.yaml": lambda path: RECIPE.save(path),
    "graph.svg": lambda path: draw_graph(make_space().graph, path=path),
    "grid.png": write_grid,
    "record.json": lambda path: write_json(path, {"version": 1}),
    "tensors.safetensors": lambda path: save_tensors(path, {"a": make_tensor()}, {"kind": "mine"}),
}


def make_tensor():
    return next(get_denoiser(load_pipeline("digits-dit")).parameters())


@pytest.mark.parametrize("content", [b"thesis", b"", b'{"results": [1, 2]}', b"\x89PNG\r\n\x1a\nbroken"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_others_is_not_overwritten(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(QuantDMError, match=name):
        WRITERS[name](path)
    assert snapshot(tmp_path) == {name: content}


@pytest.mark.parametrize("name", WRITERS)
def test_what_a_writer_wrote_it_replaces_and_a_link_stays(name, tmp_path):
    path = tmp_path / name
    WRITERS[name](path)
    first = path.read_bytes()
    (tmp_path / "real").mkdir()
    path.rename(tmp_path / "real" / name)
    path.symlink_to(tmp_path / "real" / name)
    WRITERS[name](path)
    assert path.is_symlink()
    assert sorted((tmp_path / "real" / name).read_bytes()) == sorted(first)  # the order of metadata is random
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [name, name]


def test_a_recipe_that_was_edited_by_hand_is_kept(tmp_path):
    path = RECIPE.save(tmp_path / "mine.yaml")
    assert load_recipe(path) == RECIPE
    path.write_text(path.read_text().replace("channel-4", "channel-5"))
    with pytest.raises(QuantDMError, match="not as quantdm wrote it"):
        RECIPE.save(path)
    assert load_recipe(path).default == "uniform-channel-5"


def test_a_picture_of_others_is_kept(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.png")
    before = snapshot(tmp_path)
    with pytest.raises(QuantDMError, match="no grid"):
        write_grid(tmp_path / "photo.png")
    assert snapshot(tmp_path) == before


def test_tensors_of_another_kind_are_kept(tmp_path):
    path = tmp_path / "samples.safetensors"
    save_tensors(path, {"a": make_tensor()}, {"kind": "samples"})
    with pytest.raises(QuantDMError, match="holds something else"):
        save_tensors(path, {"a": make_tensor()}, {"kind": "correction"})


def test_the_recipe_of_a_run_or_of_an_export_is_not_replaced_by_another(run, small):
    for path in (run / "recipe.yaml", small / "recipe.yaml"):
        before = path.read_bytes()
        with pytest.raises(QuantDMError, match=r"is the recipe of the (run|export) beside it"):
            RECIPE.save(path)
        assert path.read_bytes() == before
    assert RECIPE.save(run / "recipe-3.5.yaml").is_file()


def test_reports_and_insights_replace_only_themselves(run):
    for make, name in ((write_report, "report.html"), (save_insights, "insights/methods.svg")):
        make(run)
        make(run)
        path = run / name
        path.write_text("<p>my notes</p>")
        before = snapshot(run)
        with pytest.raises(QuantDMError, match="not as quantdm wrote it"):
            make(run)
        assert snapshot(run) == before
    with pytest.raises(QuantDMError, match="not as quantdm wrote it"):
        write_report(run, out=run / "insights" / "methods.svg")


def test_going_on_with_a_run_keeps_a_recipe_that_was_edited_by_hand(run):
    settings = Run.open(run).settings
    assert Run.create(run, settings).settings == settings
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text() + "# mine\n")
    before = snapshot(run)
    Run.create(run, settings)
    assert snapshot(run) == before


def test_published_trials_go_into_a_folder_of_their_own(run, tmp_path):
    TrialStore(tmp_path / "new").check_own()
    store = TrialStore(tmp_path / "own")
    store.put("0" * 16, {"fid_fp": 1.0})
    store.check_own({"0" * 16})
    with pytest.raises(QuantDMError, match="none of these trials"):
        store.check_own({"1" * 16})
    (tmp_path / "own" / "notes.txt").write_text("mine")
    for folder, keys in ((tmp_path / "own", None), (run / "trials", {"1" * 16}), (run, None)):
        with pytest.raises(QuantDMError, match="none of these trials"):
            TrialStore(folder).check_own(keys)


# ------------------------------------------------------------------------------------------------------ bad places


def test_a_place_that_cannot_be_written_is_refused_at_the_door(tmp_path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path, folder, expected in (
        (tmp_path / "file" / "x", False, "is no directory"),
        (tmp_path / "file" / "x" / "y", True, "is no directory"),
        (tmp_path / "file", True, "is a file, expected a directory"),
        (tmp_path / "folder", False, "is a directory, expected a file"),
        ("/proc/x/y", False, "cannot be written"),
        ("/proc/x", True, "cannot be written"),
        (tmp_path / "pipe", False, "no plain file"),
        (tmp_path / ("n" * 300), False, "cannot be written"),
        (f"{tmp_path}/a\0b", False, "cannot be written"),
    ):
        with pytest.raises(QuantDMError, match=expected):
            check_output(path, folder=folder)
        if not folder:
            with pytest.raises(QuantDMError), atomic_path(path) as temporary:
                temporary.write_text("x")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "pipe"]
    assert not (tmp_path / "pipe").is_file()
    assert check_output(tmp_path / "new" / "deep", folder=True) == tmp_path / "new" / "deep"
    assert not (tmp_path / "new").exists()


def test_a_sealed_text_is_read_back_and_any_change_breaks_the_seal(tmp_path):
    path = tmp_path / "a.yaml"
    for text in ("a: 1\n", "", "# comment\na: 1", "ä: 1\n"):
        write_text(path, text, YAML_COMMENT)
        assert path.read_text().startswith(text)
    whole = path.read_text()
    for changed in (whole + "\n", whole.replace("1", "2", 1), whole[:-2] + "\n", whole.upper()):
        path.write_text(changed)
        with pytest.raises(QuantDMError, match="not as quantdm wrote it"):
            write_text(path, "b: 2\n", YAML_COMMENT)


def test_graphs_are_the_same_in_memory_and_in_the_file(tmp_path):
    graph = trace_graph(get_denoiser(load_pipeline("digits-dit")))
    svg = draw_graph(graph, path=tmp_path / "graph.svg")
    assert (tmp_path / "graph.svg").read_text().startswith(svg)


@pytest.mark.parametrize("name", ["export/thesis.txt", "report.html"])
def test_the_demo_looks_at_its_last_places_first(name, tmp_path):
    options = {"target_bits": 3.0, "quick": True, "say": lambda _: None}
    level = LEVELS["quick"]
    run, _ = start_run(
        look_at("digits-dit"), tmp_path / "run", target_bits=3.0, trials=level.trials, options=level.options,
        effort=level.effort,
    )  # fmt: skip
    path = run.path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(QuantDMError, match=r"no export of quantdm|not as quantdm wrote it"):
        demo(run_dir=tmp_path / "run", **options)
    run.path("stopped.json").unlink()  # why it stopped, for `quantdm status`: the one thing that is left
    assert snapshot(tmp_path) == before
