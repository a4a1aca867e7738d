"""Why one recipe is better than another: the command, the record of a run, and what a report says of it."""

import json
import shutil

import numpy as np
import pytest

from quantdm import QuantDMError, load_recipe
from quantdm.files import read_json, write_json
from quantdm.report import write_report
from quantdm.report.advice import advice, cheapest_savings, doubts, read_names, shared_schemes
from quantdm.runs.explain import fit_surrogates, leading_of
from quantdm.runs.run import Run
from quantdm.runs.stages import load_space
from quantdm.runs.trials import load_trials
from quantdm.runs.why import choice_of, explain_choice, measured_difference, rival_of
from quantdm.schemes import ORIGINAL
from quantdm.surrogates import SearchSpace
from quantdm.surrogates.attribution import summarise
from tests.report_run import make_space
from tests.test_cli import run as command


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    return Run.open(shutil.copytree(finished[0], tmp_path_factory.mktemp("why") / "run"))


@pytest.fixture(scope="module")
def space(run):
    return load_space(run)


def test_the_run_says_why_its_choice_beats_the_rival(run, space):
    record, selection = read_json(run.path("why.json")), read_json(run.path("selection.json"))
    assert record["chosen"] == selection["chosen"]
    assert record["against"] == rival_of(selection["configs"], selection["chosen"])
    assert set(record["explanations"]) == {"additive", "tree", "graph"}
    for one in record["explanations"].values():
        total = sum(row["contribution"] for row in one["layers"])
        assert total == pytest.approx(one["predicted"] - one["base"], abs=1e-5)
    chosen, rival = (selection["candidates"][record[key]] for key in ("chosen", "against"))
    assert len(record["measured"]) >= 2  # both were verified on two draws
    assert np.sign(np.mean(record["measured"][-2:])) == np.sign(rival["fid_fp_mean"] - chosen["fid_fp_mean"])


def test_the_command_explains_a_recipe_in_80_columns_and_as_json(run, space):
    recipe = run.path("recipe.yaml")
    arguments = ["explain", "--run-dir", str(run.folder), "--recipe", str(recipe), "--against", "uniform-channel-4"]
    text = command(*arguments, "--top", "5")
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "(base)" in text
    assert "difference predicted" in text
    assert "% of all that changed" in text
    assert "Needed and enough for 80 %" in text
    for by in ("graph", "additive", "tree"):
        record = json.loads(command(*arguments, "--by", by, "--json"))
        assert record["source"] == by
        total = sum(row["contribution"] for row in record["layers"])
        assert total == pytest.approx(record["predicted"] - record["base"], abs=1e-5)
    fitted = fit_surrogates(run, space, *load_trials(run, space))
    found = json.loads(command(*arguments, "--json"))
    assert found["source"] == leading_of(run, fitted)
    predicted = fitted[found["source"]].predict(space.choice_of(load_recipe(recipe).config))[0]
    assert found["predicted"] == pytest.approx(predicted)
    assert "same configuration" in command(*arguments[:4], str(recipe), "--against", str(recipe))


def test_the_command_without_recipes_gives_advice(run):
    text = command("explain", "--run-dir", str(run.folder))
    assert all(len(line) <= 80 for line in text.splitlines())
    for start in ("Protect", "Spend", "One byte less", "One scheme for all", "What is not known", "Names"):
        assert f"\n{start}" in text


def test_measured_differences_are_those_of_the_trials(run, space):
    choices, y = load_trials(run, space)
    assert y[3] - y[5] in measured_difference(run, space, choices[3], choices[5])
    unmeasured = choices[3].copy()
    unmeasured[::2] = choices[5][::2]
    assert measured_difference(run, space, unmeasured, choices[5]) == []


def test_what_is_no_configuration_of_the_run_is_one_clear_error(run, space, tmp_path):
    (tmp_path / "other.yaml").write_text("version: 1\nmodel: other\nlayers: {blocks.0.fc: kmeans-channel-4}\n")
    (tmp_path / "scheme.yaml").write_text("version: 1\nmodel: digits-dit\ndefault: kmeans-channel-8\n")
    for given, expected in (
        ("nowhere.yaml", "no recipe file, and no option"),
        ("kmeans-chanel-4", "kmeans-channel-4"),
        (tmp_path / "other.yaml", "not a configuration of the run"),
        (tmp_path / "scheme.yaml", "which is no option"),
    ):
        with pytest.raises(QuantDMError, match=expected):
            choice_of(run, space, given)
    for arguments, expected in ((["--recipe", "uniform-channel-4"], "both"), (["--by", "oracle"], "expected one of")):
        with pytest.raises(QuantDMError, match=expected):
            command("explain", "--run-dir", str(run.folder), *arguments)


def test_the_report_tells_it(run):
    html = write_report(run.folder).read_text()
    assert "Why this recipe" in html
    assert "difference predicted" in html
    assert "What is not known" in html
    run.path("why.json").unlink()
    assert "No comparison with a rival" in write_report(run.folder).read_text()


def test_the_path_of_the_damage_is_measured_once_and_drawn(run):
    arguments = ["explain", "--run-dir", str(run.folder), "--paths", "--top", "3"]
    command(*arguments)
    text = command(*arguments)  # the record is kept: nothing is opened any more
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "edges of the data flow" in " ".join(text.split())
    record = read_json(run.path("paths.json"))
    assert record["undone"] - record["missing"] >= 0.8
    assert 0 < len(record["carrying"]) < len(record["edges"])
    drawn = [pair for index in record["carrying"] for pair in record["edges"][index]["drawn"]]
    assert {tuple(pair) for pair in drawn} <= set(load_space(run).graph.edges)
    assert write_report(run.folder).read_text().count('class="trail"') == len(drawn)
    before = run.path("paths.json").stat().st_mtime_ns
    assert json.loads(command(*arguments, "--json")) == record
    assert run.path("paths.json").stat().st_mtime_ns == before
    with pytest.raises(QuantDMError, match="--paths goes with --recipe alone"):
        command(*arguments, "--recipe", "uniform-channel-4", "--against", "kmeans-channel-4")


def test_a_rival_that_leaves_a_layer_as_it_is_is_compared_too(run, space, tmp_path):
    copied = Run.open(shutil.copytree(run.folder, tmp_path / "run"))
    free = [np.column_stack([table, np.zeros(len(space.layers))]) for table in (space.weight_error, space.noise_error)]
    bits = np.column_stack([space.bits, 16 * space.num_weights])
    wider = SearchSpace(space.layers, space.graph, (*space.options, ORIGINAL), bits, *free)
    selection = read_json(copied.path("selection.json"), version=1)
    selection["configs"]["sensitivity"] = {**selection["configs"][selection["chosen"]], space.layer_names[0]: None}
    write_json(copied.path("selection.json"), selection)
    copied.path("why.json").unlink(missing_ok=True)
    explain_choice(copied, wider, {})
    assert read_json(copied.path("why.json"), version=1)["against"] == "sensitivity"


def test_too_few_trials_are_one_clear_error(run, tmp_path):
    copy = shutil.copytree(run.folder, tmp_path / "run")
    for path in sorted((copy / "trials").glob("*.json"))[8:]:
        path.unlink()
    with pytest.raises(QuantDMError, match="got 8 trials, expected at least 10"):
        command("explain", "--run-dir", str(copy))


# ------------------------------------------------------------------------------------------------------------- advice


@pytest.fixture(scope="module")
def planted():
    """A space, and values that are a sum of a method's, a width's and a type's effect."""
    space = make_space()
    width = np.array([float(option.bits) for option in space.options])
    method = np.array([0.5 * (option.method == "kmeans") for option in space.options])
    role = np.array([2.0 if layer.op_type == "ff.net.2" else 1.0 for layer in space.layers])
    return space, role[:, None] * (width + method)[None] / 10


def test_the_readout_of_names_finds_planted_effects(planted):
    space, values = planted
    names = read_names(space, values)
    assert names.share == pytest.approx(1)
    scale = names.widths[4] - names.widths[3]
    assert names.widths[3] - names.widths[2] == pytest.approx(scale)
    kmeans, uniform = names.methods["kmeans-channel"], names.methods["uniform-channel"]
    assert (kmeans - uniform) / scale == pytest.approx(0.5)
    others = [felt for name, felt in names.roles.items() if name != "ff.net.2"]
    assert names.roles["ff.net.2"] == pytest.approx(2 * others[0])
    assert np.ptp(others) < 1e-9


def test_the_cheapest_saving_is_the_least_loss_per_bit_by_brute_force(planted):
    space, values = planted
    choice = np.full(len(space.layers), len(space.options) - 1)
    best = min(
        (values[i, choice[i]] - values[i, o]) / (space.bits[i, choice[i]] - space.bits[i, o])
        for i in range(len(choice))
        for o in range(len(space.options))
        if space.bits[i, o] < space.bits[i, choice[i]]
    )
    first = cheapest_savings(space, values, choice)[0]
    assert first.loss / first.saved_bits == pytest.approx(best)


def test_layers_that_have_one_scheme_share_it_at_no_loss(planted):
    space, values = planted
    choice = values.argmax(axis=1)
    for item in shared_schemes(space, values, choice):
        assert item.schemes == 1
        assert item.loss == pytest.approx(0)
        assert item.scheme == space.labels[choice[0]]


def test_doubt_is_where_the_spread_is_larger_than_the_gap(planted):
    space, values = planted
    spread = np.zeros_like(values)
    choice = values.argmax(axis=1)
    assert doubts(space, summarise("x", space, values, spread), choice) == []
    spread[4] = 10.0
    found = doubts(space, summarise("x", space, values, spread), choice)
    assert [item.layer for item in found] == [space.layer_names[4]]
    assert space.layer_names[4] in advice(space, summarise("x", space, values, spread), choice)[2]
