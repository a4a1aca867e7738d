"""Layers that stay as they are: an option of the search like any other, that no trial takes everywhere."""

import numpy as np
import pytest
import torch

from quantdm import QuantDMError, load_pipeline, quantize_weight, select
from quantdm.allocation.candidates import baseline_choices
from quantdm.allocation.pruning import dominated
from quantdm.quantizers import count_bits
from quantdm.quantizers.worth import is_wasteful
from quantdm.report.figures import color, describe
from quantdm.runs.settings import fitting_options
from quantdm.runs.trials import first_trials
from quantdm.schemes import ORIGINAL, PAPER_OPTIONS, Scheme, parse_option
from quantdm.surrogates import SearchSpace
from tests.planted import planted_space

OPTIONS = (*PAPER_OPTIONS, Scheme.parse("uniform-channel-8"), ORIGINAL)


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    layers = planted_space().layers
    rng = np.random.default_rng(0)
    bits = np.array([[count_bits(la.shape, option, la.split) for option in OPTIONS] for la in layers])
    errors = np.array([4.0**-option.bits for option in OPTIONS]) * rng.lognormal(size=(len(layers), 1))
    errors[:, -1] = 0
    return SearchSpace(layers, planted_space().graph, OPTIONS, bits, errors, errors)


def test_it_costs_sixteen_bits_and_is_no_scheme_of_a_weight() -> None:
    assert count_bits((10, 20), ORIGINAL) == 16 * 200
    assert not is_wasteful((10, 20), ORIGINAL)
    assert parse_option("original") == ORIGINAL
    assert describe("original") == describe(None)
    assert color(ORIGINAL) == color(None)
    with pytest.raises(QuantDMError):
        Scheme.parse("original")
    with pytest.raises(QuantDMError, match="leave the layer out"):
        quantize_weight(torch.ones(2, 2), ORIGINAL)


def test_the_knapsack_takes_it_where_it_pays(space) -> None:
    needy = int(np.argmin(space.num_weights))  # small, and worth more than all others together
    values = -space.noise_error.copy()
    values[needy] *= 1e9
    choice = select(space, values, target_bits=4.0, forbidden=dominated(space))
    assert space.config(choice)[space.layer_names[needy]] is None
    assert (space.choice_of(space.config(choice)) == choice).all()
    assert float(space.avg_bits(choice)[0]) <= 4.0
    everything = select(space, -space.noise_error, target_bits=16.0)
    assert set(space.config(everything).values()) == {None}


def test_what_costs_more_than_the_original_is_barred() -> None:
    layers = planted_space().layers
    options = (Scheme.parse("kmeans-channel-8"), Scheme.parse("uniform-channel-4"), ORIGINAL)
    bits = np.array([[count_bits(la.shape, option, la.split) for option in options] for la in layers])
    errors = np.tile([1e-4, 1e-2, 0.0], (len(layers), 1))
    graph = planted_space().graph
    barred = dominated(SearchSpace(layers, graph, options, bits, errors, errors))
    dear = [la.name for la, row in zip(layers, bits, strict=True) if row[0] >= row[2]]
    assert dear
    assert all("kmeans-channel-8" in barred[name] and "original" not in barred[name] for name in dear)


def test_no_trial_is_the_reference_itself(space) -> None:
    choices = first_trials(space, 60, targets=[3.0], seed=0)
    stays = OPTIONS.index(ORIGINAL)
    assert (choices == stays).mean(axis=1).max() < 0.5
    assert {*choices[(choices == choices[:, :1]).all(axis=1)][:, 0]} == set(range(len(OPTIONS))) - {stays}
    assert float(space.avg_bits(choices).max()) < 8.5
    assert not any(name.endswith("original") for name in baseline_choices(space, 3.0))


def test_no_error_at_all_is_no_outlier_of_what_the_surrogates_see(space) -> None:
    assert (space.felt_error[:, :-1] == space.noise_error[:, :-1]).all()
    assert np.allclose(space.felt_error[:, -1], space.noise_error[:, :-1].min(axis=1) / 16)


def test_a_space_with_it_is_stored(space, tmp_path) -> None:
    space.save(tmp_path / "space.json")
    again = SearchSpace.load(tmp_path / "space.json")
    assert again.options == space.options
    assert again.digest == space.digest


def test_it_is_offered_where_sixteen_bits_hold_the_weights() -> None:
    pipe = load_pipeline("digits-dit")
    assert fitting_options(OPTIONS, pipe) == OPTIONS
    pipe.transformer.proj_out_2.weight.data += 1e-7  # which no 16 bits hold
    assert fitting_options(OPTIONS, pipe) == OPTIONS[:-1]
