"""Schemes that cost more than they save: told by a closed form, refused, marked, left out of the choice."""

import re

import numpy as np
import pytest
from typer.testing import CliRunner

from quantdm import QuantDMError, Recipe, Scheme, apply_recipe, get_denoiser, list_layers, load_pipeline
from quantdm.allocation.pruning import dominated
from quantdm.cli.layer_table import layers_text
from quantdm.cli.main import app
from quantdm.denoisers.analysis import trace_graph
from quantdm.hub.inspection import inspect_target
from quantdm.hub.worth import check_worth
from quantdm.modules import packed_layers
from quantdm.quantizers import count_bits
from quantdm.quantizers.worth import bits_of, is_wasteful
from quantdm.surrogates import SearchSpace

NARROW = "pos_embed.proj"  # 160 rows of 16 weights: 16 entries of 8 bits and a scale are 9 bits a weight


@pytest.mark.parametrize(
    ("shape", "label", "bits", "expected"),
    [
        ((64, 256), "kmeans-channel-8", 8 + 8 + 16 / 256, True),
        ((64, 1152), "kmeans-channel-8", 8 + (256 * 8 + 16) / 1152, False),
        ((64, 160), "kmeans-channel-4", 4 + (16 * 8 + 16) / 160, False),
        ((160, 4, 2, 2), "kmeans-channel-4", 4 + 9, True),
        ((160, 4, 2, 2), "uniform-channel-8", 8 + 2, False),
        ((8, 2), "uniform-channel-2", 2 + 16, True),
    ],
)
def test_what_a_scheme_really_takes_decides(shape, label, bits, expected):
    scheme = Scheme.parse(label)
    assert bits_of(shape, scheme) == pytest.approx(bits + 32 / np.prod(shape))
    assert is_wasteful(shape, scheme) is expected


def test_apply_refuses_with_the_figure_unless_insisted_on_and_inspect_marks_it(tmp_path):
    recipe = Recipe(model="digits-dit", default="uniform-channel-4", layers={NARROW: "kmeans-channel-4"})
    arguments = ["apply", "digits-dit", "--recipe", str(recipe.save(tmp_path / "r.yaml")), "-o", str(tmp_path / "out")]
    with pytest.raises(QuantDMError, match=rf"1 layers .* {NARROW}: kmeans-channel-4 takes 13.01 bits .*--insist"):
        check_worth(load_pipeline("digits-dit"), recipe)
    pipe = load_pipeline("digits-dit")
    with pytest.raises(QuantDMError, match=rf"{NARROW}: kmeans-channel-4 takes 13.01 bits .*insist=True"):
        apply_recipe(pipe, recipe)
    assert not packed_layers(pipe.transformer)
    assert packed_layers(apply_recipe(pipe, recipe, insist=True).transformer)
    assert CliRunner().invoke(app, arguments).exit_code != 0
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, [*arguments, "--insist"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "left unquantized: embedding tables 1.922 MB" in result.stdout
    record = inspect_target(str(tmp_path / "out"))
    assert [row["name"] for row in record["layers"] if row["wasteful"]] == [NARROW]
    assert re.search(r"13\.01\d!", layers_text(record))


def test_the_choice_leaves_it_out_where_another_option_is_left():
    denoiser = get_denoiser(load_pipeline("digits-dit"))
    layers, options = list_layers(denoiser), tuple(map(Scheme.parse, ("kmeans-channel-4", "uniform-channel-4")))
    bits = np.array([[count_bits(la.shape, o, la.split) for o in options] for la in layers])
    errors = np.tile([0.1, 0.2], (len(layers), 1))  # k-means is better everywhere
    barred = dominated(SearchSpace(layers, trace_graph(denoiser), options, bits, errors, errors))
    assert barred[NARROW] == ["kmeans-channel-4"]
    assert not any(labels for name, labels in barred.items() if name != NARROW)
    alone = SearchSpace(layers, trace_graph(denoiser), options[:1], bits[:, :1], errors[:, :1], errors[:, :1])
    assert not dominated(alone)[NARROW]
