"""One-layer errors: measured for all options, or told from one of them by the errors of the layer's output."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantdm import QuantDMError, Scheme
from quantdm.files import read_json
from quantdm.pipelines.subject import look_at
from quantdm.quantizers import Moments
from quantdm.quantizers.objective import output_error
from quantdm.runs.engines.local import Engine
from quantdm.runs.search import start_run
from quantdm.runs.sensitivities import completed, probed
from quantdm.runs.settings import QUICK, Effort
from quantdm.runs.stages import build_bank, measure_space
from quantdm.surrogates.ranking import spearman

LABELS = ("kmeans-channel-2-feedback", "kmeans-channel-3-feedback", "kmeans-channel-4-feedback", "uniform-channel-5")
OPTIONS = tuple(map(Scheme.parse, LABELS))
EFFORT = Effort(label_images=2, label_steps=4, verify_images=2, noise_images=4, calibration_images=8, sweeps=0)


@pytest.mark.parametrize("groups", [1, 3])
def test_the_output_error_is_that_of_the_outputs_themselves(groups):
    torch.manual_seed(0)
    inputs = torch.randn(groups, 50, 8) @ torch.randn(groups, 8, 8)
    weight = torch.randn(6 * groups, 2, 4)
    changed = weight + 0.1 * torch.randn_like(weight)
    released = []
    moments = Moments(inputs.mT @ inputs / 50, 50, lambda: released.append(1))

    def outputs(w):
        return inputs.double() @ w.double().view(groups, 6, 8).mT

    expected = (outputs(changed) - outputs(weight)).square().sum() / outputs(weight).square().sum()
    assert output_error(weight, changed, moments) == pytest.approx(float(expected), rel=1e-5)
    assert released  # the memory of a file is let go of
    assert output_error(weight, weight, moments) == 0
    assert output_error(torch.zeros_like(weight), torch.zeros_like(weight), moments) == 0


def test_rows_of_wide_moments_add_up(monkeypatch):
    torch.manual_seed(0)
    inputs, weight = torch.randn(1, 40, 30), torch.randn(5, 30)
    moments, changed = Moments(inputs.mT @ inputs, 40), weight.round()
    whole = output_error(weight, changed, moments)
    monkeypatch.setattr("quantdm.quantizers.objective.ROWS", 7)
    assert output_error(weight, changed, moments) == pytest.approx(whole, rel=1e-5)


@given(
    st.dictionaries(st.integers(2, 99), st.floats(1e-8, 1.0), min_size=1, max_size=9),
    st.floats(1e-3, 1e3),
    st.floats(0.3, 2.0),
    st.integers(1, 9),
)
def test_a_power_of_the_output_error_is_found_between_what_was_measured(outputs, factor, power, count):
    truth = {label: factor * output**power for label, output in outputs.items()}
    measured = {label: truth[label] for label in probed(outputs, count)}
    found = completed(measured, outputs)
    assert found.keys() == outputs.keys()
    xs = [outputs[label] for label in measured]
    for label, output in outputs.items():
        if label in measured:
            assert found[label] == measured[label]
        elif min(xs) <= output <= max(xs):
            assert found[label] == pytest.approx(truth[label], rel=1e-6)
        else:  # in proportion, from the nearest that was measured
            edge = min(measured, key=lambda each: abs(math.log(outputs[each] / output)))
            assert found[label] == pytest.approx(truth[edge] * output / outputs[edge], rel=1e-6)


def test_no_error_of_the_output_is_no_error_at_the_end_and_a_chance_dip_is_not_believed():
    outputs = {"none": 0.0, "little": 0.01, "some": 0.1, "middle": 0.03, "much": 1.0}
    found = completed({"little": 2e-3, "some": 1e-3, "much": 5e-2}, outputs)
    assert found["none"] == 0
    assert found["some"] == 1e-3
    assert found["middle"] == pytest.approx(2e-3)


def test_options_are_probed_evenly_over_their_errors_and_all_where_one_is_unknown():
    outputs = {"e": 5.0, "a": 1.0, "c": 3.0, "b": 2.0, "d": 4.0}
    assert probed(outputs, 1) == ["c"]
    assert sorted(probed(outputs, 2)) == ["b", "d"]
    assert probed(outputs, None) == probed(outputs, 5) == probed(outputs, 9) == [*outputs]
    assert probed(outputs | {"b": None}, 1) == [*outputs]


def test_one_measured_option_of_every_layer_ranks_all_of_them_as_measuring_them_does(dit, tmp_path):
    spaces = []
    for count in (1, None):
        folder = tmp_path / str(count)
        run, subject = start_run(
            look_at(dit), folder, target_bits=3.0, trials=30, options=OPTIONS,
            effort=replace(EFFORT, noise_options=count),
        )  # fmt: skip
        if count is None:
            shutil.copytree(tmp_path / "1" / "bank", folder / "bank")
        with Engine(run, subject, workers=1) as engine:
            spaces.append(measure_space(run, engine, subject, build_bank(run, subject)))
        rows = read_json(folder / "sensitivity.json", version=1)["noise_error"]
        assert {len(row) for row in rows.values()} == {count or len(OPTIONS)}
    told, measured = (np.log(space.noise_error).ravel() for space in spaces)
    assert (told == measured).sum() >= len(subject.layers)
    assert spearman(told, measured) > 0.93 > spearman(np.log(spaces[0].weight_error).ravel(), measured)


def test_the_quick_level_measures_one_option_a_layer_and_none_is_no_number_of_them():
    assert QUICK.noise_options == 1
    with pytest.raises(QuantDMError, match=r"noise_options: got 0, expected 1 or more"):
        Effort(noise_options=0)
