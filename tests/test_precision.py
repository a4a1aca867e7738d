"""Bits per step: the published rule, the exact budget, the measured ranges; honoured while a pipeline samples."""

import itertools
import math

import numpy as np
import pytest
import torch

from quantdm import ActivationSpec, QuantDMError, Recipe, load_recipe
from quantdm.activations import set_activation_bits_
from quantdm.activations.rounding import quantize_activations
from quantdm.correction import budgeted_bits, measured_bits, ptqd_bits, spec_of_steps
from quantdm.recipe import ActivationScheme
from tests.test_correction import make_correction
from tests.test_correction_fit import dit_run, make_dit, mse

LEVELS = [-4.0, -2.0, 0.0, 2.0, 4.0]


def corrections(**settings):
    """Statistics of 4 and 8 bits: the fewer, the noisier."""
    found = {}
    for bits, q, snr in ((4, 0.2, 4.0), (8, 0.01, 40.0)):
        found[bits] = make_correction(k=0.0, q=q, diagnostics={"snr": np.full(2, snr)}, **settings)
    return found


def test_ptqds_rule_gives_few_bits_to_the_noisy_steps_in_both_readings():
    # SNR^F = e^level: 0.02, 0.14, 1, 7.4, 54.6
    assert ptqd_bits(corrections(), LEVELS) == [4, 4, 4, 8, 8]
    assert ptqd_bits(corrections(), LEVELS, squared=True) == [4, 4, 4, 4, 8]


@pytest.mark.parametrize("mean_bits", [4.0, 4.9, 5.6, 7.2, 8.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_budgeted_rule_is_the_best_of_all(mean_bits, prediction):
    levels = [-4.0, -1.0, 0.0, 2.5, 3.0]
    found = budgeted_bits(corrections(prediction_type=prediction), levels, mean_bits)
    weights = np.expm1(np.array([1.5, 0.5, 1.25, 0.25, 0.25])) ** 2

    def cost(bits):
        def unit(level):
            return 1.0 if prediction == "epsilon" else (1 + math.exp(-level)) ** -0.5

        noises = [({4: 0.2, 8: 0.01}[b] * unit(level)) ** 2 for b, level in zip(bits, levels, strict=True)]
        return float(weights @ noises)

    everything = [bits for bits in itertools.product((4, 8), repeat=5) if sum(bits) <= 5 * mean_bits + 1e-9]
    assert sum(found) <= 5 * mean_bits + 1e-9
    assert cost(found) == pytest.approx(min(cost(bits) for bits in everything), rel=1e-12)


def test_measured_ranges_find_the_steps_that_need_bits():
    need = np.array([0.0, 0, 0, 0, 0, 0.1, 3.0, 4.0, 0.1, 0, 0, 0, 0, 0, 0, 0])
    asked = []

    def error(bits):
        asked.append(bits)
        return float(sum(n for n, b in zip(need, bits, strict=True) if b == 4))

    bits = measured_bits(error, 16, 4, 8, 4.5, runs=10)
    assert [i for i, b in enumerate(bits) if b == 8] == [6, 7]
    assert len(asked) <= 10
    assert measured_bits(lambda bits: 1.0, 6, 4, 8, 6.0) == [4] * 6  # nothing gains


def test_bits_of_steps_are_buckets_of_timesteps():
    spec = spec_of_steps(ActivationSpec(default="token-4"), [900.0, 600.0, 300.0, 0.0], [16, 4, 4, 8])
    assert spec.buckets == (750.0, 150.0)
    assert spec.bucket_bits == (16, 4, 8)
    four, eight = ActivationScheme.parse("token-4"), ActivationScheme.parse("token-8")
    assert [spec.in_bucket(four, bucket) for bucket in range(3)] == [None, four, eight]
    assert [spec.in_bucket(eight, bucket) for bucket in range(3)] == [None, eight, eight]
    for wrong in ((4,), (4, 4, 99)):
        with pytest.raises(ValueError, match="for each bucket one of"):
            ActivationSpec(default="token-4", buckets=(750.0, 150.0), bucket_bits=wrong)
    with pytest.raises(QuantDMError, match="expected one each"):
        spec_of_steps(spec, [900.0], [4, 8])
    with pytest.raises(QuantDMError, match="4 or more"):
        budgeted_bits(corrections(), LEVELS, 3.0)
    with pytest.raises(QuantDMError, match="diagnostic 'snr'"):
        ptqd_bits({4: make_correction()}, LEVELS)


def test_a_recipe_keeps_bits_per_step(tmp_path):
    spec = spec_of_steps(ActivationSpec(default="token-4"), [900.0, 100.0], [4, 8])
    path = Recipe(model="m", layers={"a": None}, activations=spec).save(tmp_path / "recipe.yaml")
    assert load_recipe(path).activations == spec


def test_each_step_has_its_bits_while_a_pipeline_samples():
    pipe = make_dit()
    pipe.scheduler.set_timesteps(4)
    times = pipe.scheduler.timesteps.tolist()
    spec = spec_of_steps(ActivationSpec(default="token-4"), times, [16, 4, 4, 8])
    layer = pipe.transformer.transformer_blocks[0].ff.net[2]
    set_activation_bits_(pipe.transformer, spec)
    try:
        seen = []
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        dit_run(3)(pipe)
    finally:
        set_activation_bits_(pipe.transformer, None)
    expected = [None, 4, 4, 8]
    for x, bits in zip(seen, expected, strict=True):
        levels = x.flatten(0, -2)[0].unique().numel()
        assert levels > 2**4 if bits is None else levels <= 2**bits
        if bits is not None:
            scheme = ActivationScheme(bits=bits)
            assert torch.allclose(quantize_activations(x, scheme, dims=-1, channel=-1), x, atol=1e-5)


def test_few_bits_in_any_steps_err_more_than_many_in_all():
    pipe, errors = make_dit(), []
    exact = dit_run(3)(pipe)
    pipe.scheduler.set_timesteps(4)
    times = pipe.scheduler.timesteps.tolist()
    for bits in ([3] * 4, [3, 3, 8, 8], [8] * 4, [16] * 4):
        set_activation_bits_(pipe.transformer, spec_of_steps(ActivationSpec(default="token-3"), times, bits))
        errors.append(mse(dit_run(3)(pipe), exact))
        set_activation_bits_(pipe.transformer, None)
    assert min(errors[:2]) > errors[2] > errors[3] == 0.0
    assert errors[0] != errors[1]


def test_a_bucket_of_16_bits_quantizes_nothing_and_sensitive_layers_keep_their_bits_elsewhere():
    spec = ActivationSpec(
        default="token-6", types={"a": "token-8"}, probabilities="uniform-8", buckets=(500.0,), bucket_bits=(16, 4)
    )
    common, sensitive = ActivationScheme(bits=6), ActivationScheme(bits=8)
    assert spec.in_bucket(common, 0) is spec.in_bucket(sensitive, 0) is spec.probabilities_in(0) is None
    assert spec.in_bucket(common, 1) == ActivationScheme(bits=4)
    assert spec.in_bucket(sensitive, 1) == sensitive
    assert spec.probabilities_in(1) == "uniform-8"
