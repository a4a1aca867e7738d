"""What the report says: verdicts, insights, the next bit, all against brute force and planted effects."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from quantdm.correction import Correction
from quantdm.errors import QuantDMError
from quantdm.files import read_json
from quantdm.report.insight_files import save_insights
from quantdm.report.insights import group_layers, headline, insights, least_error, one_more_bit, verdict
from quantdm.report.noise import worth
from quantdm.report.wording import megabytes, plus_minus
from quantdm.surrogates import SearchSpace
from tests.report_run import ROWS, SENSITIVE, make_run, make_space, row


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return make_space()


@pytest.mark.parametrize(
    ("variance", "variant", "feasible", "told"),
    [
        (
            [0.3, 0.3, 0.2, 0.3],
            "variance",
            1.0,
            ["is worth it here", "0.2750 against 0.5000", "gain of 0.2250 ± 0.0250"],
        ),
        ([0.5, 0.4, 0.5, 0.5], "none", 1.0, ["is within noise: the noise takes at most 7", "slope explains at most 2"]),
        ([0.6, 0.7], "none", 1.0, ["gain of -0.1500 ± 0.0500 over 2 held-out runs, so none helps: the noise takes"]),
        ([0.6, 0.7], "none", 0.0, ["so none helps: no step has room"]),
    ],
)
def test_one_sentence_says_with_figures_whether_a_correction_is_worth_it(variance, variant, feasible, told) -> None:
    measured = {"none": [0.5, 0.5, 0.5, 0.5], "variance": variance}
    tables = {"variance.gain": np.ones((2, 1)), "variance.bias": np.zeros((2, 1)), "variance.q": np.full(2, 0.1)}
    correction = Correction(
        [-1.0, 1.0], np.zeros(2), np.zeros((2, 1)), np.zeros((2, 1)), np.full(2, 0.1), variant=variant,
        measured=measured, rivals=tables, diagnostics={"r2": np.array([0.01, 0.02])},
    )  # fmt: skip
    steps = [{"occupancy": 0.01, "feasible": 1.0 * feasible}, {"occupancy": 0.07, "feasible": feasible}]
    sentence = worth(correction, [*steps, {"occupancy": 9.0, "feasible": 0.0}])
    assert sentence.count(". ") == 0
    for words in told:
        assert words in sentence


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
    rows["uniform-next-width"] = row("uniform-next-width", 0.06, 0.003, note="kmeans-channel-3")
    assert "of the same size (k-means per channel, 3\u00a0bits everywhere)" in headline("some-model", rows)[0]
    assert len(others) == 2
    assert "a knapsack on one-layer noise errors (fid_fp 0.0300" in others[0]
    assert "a knapsack on weight errors (fid_fp 0.0700" in others[0]
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


def test_insights_are_saved_as_files_that_agree_with_the_records(space: SearchSpace, tmp_path) -> None:
    run = make_run(tmp_path / "run", space)
    paths = save_insights(run)
    assert {path.suffix for path in paths} == {".json", ".svg"}
    assert {path.parent for path in paths} == {run / "insights"}
    for path in paths[1:]:
        assert ET.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    record = read_json(paths[0], version=1)
    assert len(record["sentences"]) == 8
    assert record["sentences"][0].startswith(f"Protect {SENSITIVE}: ")
    assert record["source"] == "tree"
    assert 0 < len(record["one_more_bit"]) <= 10
    for key in ("by_op_type", "by_block"):
        assert sum(row["layers"] for row in record[key]) == len(space.layers)
        assert sum(row["weight_share"] for row in record[key]) == pytest.approx(1)
        assert all(sum(row["schemes"].values()) == pytest.approx(1) for row in record[key])
    worst = max(record["by_op_type"], key=lambda row: row["noise_error_quantiles"]["uniform-channel-2"][2])
    assert worst["name"] == SENSITIVE
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in save_insights(run)] == before


@pytest.mark.parametrize("name", ["space.json", "recipe.yaml", "attribution.json"])
def test_insights_name_the_record_they_lack(space: SearchSpace, tmp_path, name: str) -> None:
    run = make_run(tmp_path / "run", space)
    (run / name).unlink()
    with pytest.raises(QuantDMError, match=f"{name} is missing"):
        save_insights(run)
