"""Noise statistics recover what was planted; a record keeps it; closed forms hold the variance."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from quantdm.correction import (
    RIVALS,
    VARIANTS,
    Correction,
    NoiseStatistics,
    for_guidance,
    load_correction,
    statistics_from_pairs,
)
from quantdm.correction.variance import EXCESS_LIMIT, Move, ddim_variance, kept_std, stretch
from quantdm.correction.variants import rival_tables
from quantdm.errors import QuantDMError

LEVELS = (-3.0, -1.0, 1.0)


def make_correction(levels=(-5.0, 5.0), *, k=0.1, q=0.1, bias=(0.0, 0.0), **settings):
    """A correction whose numbers are the same at every level."""
    rows = np.ones(len(levels))
    bias = rows[:, None] * np.array(bias)
    return Correction(np.array(levels), k * rows, bias, bias, q * rows, **settings)


def planted_pairs(k, bias, sigma, *, steps=LEVELS, num=400, lag=0.0):
    """Outputs [N, 2, 8, 8] and (1 + k) output + bias + a residual that repeats itself from step to step by `lag`."""
    generator = torch.Generator().manual_seed(0)
    shape = (num, 2, 8, 8)
    rest, pairs = torch.randn(shape, generator=generator, dtype=torch.float64), []
    for t in steps:
        m = torch.randn(shape, generator=generator, dtype=torch.float64) + torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)
        pairs.append((t, m, (1 + k) * m + torch.tensor(bias).double().view(1, 2, 1, 1) + sigma * rest))
        fresh = torch.randn(shape, generator=generator, dtype=torch.float64)
        rest = lag * rest + (1 - lag**2) ** 0.5 * fresh
    return list(zip(*pairs, strict=True))


# --------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("k", [0.2, -0.3])
def test_noiseless_gain_and_bias_are_recovered_exactly(k):
    fit = statistics_from_pairs(*planted_pairs(k, [0.3, -0.1], 0.0)).correction()
    assert fit.k == pytest.approx([k] * 3, abs=1e-10)
    assert np.allclose(fit.bias, [[0.3, -0.1]] * 3, atol=1e-10)
    assert fit.q == pytest.approx([0.0] * 3, abs=1e-7)
    assert fit.diagnostics["r2"] == pytest.approx([1.0] * 3)


def test_planted_noise_is_recovered_with_its_lag():
    fit = statistics_from_pairs(*planted_pairs(0.2, [0.3, -0.1], 0.3, lag=0.6)).correction()
    assert list(fit.log_snr) == list(LEVELS)
    assert fit.k == pytest.approx([0.2] * 3, abs=0.01)
    assert np.allclose(fit.bias, [[0.3, -0.1]] * 3, atol=0.02)
    assert fit.q == pytest.approx([0.3] * 3, rel=0.02)
    assert fit.diagnostics["q_robust"] == pytest.approx([0.3] * 3, rel=0.1)
    assert fit.diagnostics["r2"] == pytest.approx([0.04 / 0.13] * 3, abs=0.02)
    assert fit.diagnostics["lag1"] == pytest.approx([0.6, 0.6, 0.0], abs=0.02)


def test_outliers_raise_q_and_not_the_robust_q():
    steps, outputs, noisy = planted_pairs(0.0, [0.0, 0.0], 0.1)
    for output in noisy:
        output[::100] += 3.0
    fit = statistics_from_pairs(steps, outputs, noisy).correction()
    assert (fit.q > 2 * fit.diagnostics["q_robust"]).all()


@pytest.mark.parametrize(
    ("k", "sigma"), [(0.05, 0.3), (-0.7, 0.1)], ids=["explains too little", "turns the output over"]
)
def test_a_slope_that_is_not_trusted_is_left_in_the_rest(k, sigma):
    fit = statistics_from_pairs(*planted_pairs(k, [0.3, -0.1], sigma)).correction()
    assert not fit.k.any()
    assert np.array_equal(fit.bias, fit.shift)
    assert fit.q == pytest.approx([(k**2 + sigma**2) ** 0.5] * 3, rel=0.02)


def test_a_slope_of_few_samples_is_not_significant():
    m, noise = torch.tensor([[-1.0, -1.0, 1.0, 1.0], [1.0, -1.0, 1.0, -1.0]])[:, :, None]
    fit = statistics_from_pairs([0.5], [m], [m + 0.2 * m + 0.4 * noise]).correction()
    assert fit.diagnostics["r2"][0] > 0.05  # would pass by its share of variance
    assert fit.k[0] == 0


def test_outputs_that_do_not_vary_have_no_slope():
    values = torch.rand(40, 2, 1, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for m, delta in values:
        m = 1000 * m.expand(16, 2, 7, 7)
        fit = statistics_from_pairs([0.5], [m], [m + delta]).correction()
        assert not fit.k.any()
        assert fit.q == pytest.approx([0.0], abs=1e-12)
        assert np.allclose(fit.bias, delta.flatten(), atol=1e-12)


def test_streaming_in_batches_gives_the_same_statistics_as_all_at_once():
    steps, outputs, noisy = planted_pairs(0.2, [0.3, -0.1], 0.3, lag=0.6)
    streamed = NoiseStatistics()
    for part in (slice(0, 100), slice(100, 400)):
        streamed.begin()
        for t, m, n in zip(steps, outputs, noisy, strict=True):
            streamed.update(t, m[part], n[part])
    a, b = streamed.correction(), statistics_from_pairs(steps, outputs, noisy).correction()
    for name in ("k", "bias", "shift", "q"):
        assert np.allclose(getattr(a, name), getattr(b, name), atol=1e-12)
    assert a.diagnostics["lag1"] == pytest.approx(b.diagnostics["lag1"], abs=1e-12)


def test_outputs_that_cannot_be_compared_are_refused():
    with pytest.raises(QuantDMError, match="shapes"):
        statistics_from_pairs([0.5], [torch.zeros(2, 3, 4)], [torch.zeros(2, 3, 5)])
    with pytest.raises(QuantDMError, match="NaN"):
        statistics_from_pairs([0.5], [torch.zeros(2, 3)], [torch.full((2, 3), torch.nan)])
    with pytest.raises(QuantDMError, match="no outputs"):
        NoiseStatistics().correction()


# ------------------------------------------------------------------------------------------------------------- record


def test_a_saved_correction_comes_back_the_same(tmp_path):
    fit = statistics_from_pairs(*planted_pairs(0.2, [0.3, -0.1], 0.3)).correction(model="m", variant="k")
    fit.measured["none"] = [0.5, 0.25]
    back = load_correction(fit.save(tmp_path / "correction.safetensors"))
    assert (back.variant, back.prediction_type, back.model) == ("k", "epsilon", "m")
    assert back.measured == {"none": [0.5, 0.25]}
    assert set(back.diagnostics) == {"r2", "k_se", "bias_se", "q_se", "q_robust", "lag1", "count", "snr"}
    assert len(fit.age) == len(fit.log_snr)
    for name in ("log_snr", "k", "bias", "shift", "q", "age"):
        assert np.array_equal(getattr(back, name), getattr(fit, name))
        assert np.array_equal(getattr(Correction.from_dict(fit.to_dict()), name), getattr(fit, name))
    assert all(np.array_equal(back.diagnostics[n], fit.diagnostics[n]) for n in fit.diagnostics)


def test_errors_are_remembered_along_a_trajectory_and_for_other_steps_too():
    levels, pace = [-3.0, -1.0, 0.0, 2.5], 0.4
    generator = torch.Generator().manual_seed(3)
    outputs, error, errors = [torch.randn(64, 2, 8, 8, generator=generator) for _ in levels], torch.zeros(()), []
    for before, level in zip([-1e9, *levels[:-1]], levels, strict=True):
        kept = math.exp(-pace * (level - before))
        error = kept * error + math.sqrt(1 - kept**2) * torch.randn(64, 2, 8, 8, generator=generator)
        errors.append(error)
    fit = statistics_from_pairs(
        levels, outputs, [o + 0.1 * e for o, e in zip(outputs, errors, strict=True)]
    ).correction()
    assert np.diff(fit.age) == pytest.approx(pace * np.diff(levels), abs=0.05)
    # a step of another length, or beyond what was fitted, is on the same clock
    for first, second in ((-2.0, -1.5), (0.0, 1.0), (-5.0, -4.0), (3.0, 4.0)):
        passed = float(np.subtract(fit.age_at(second), fit.age_at(first)))
        assert passed == pytest.approx(pace * (second - first), rel=0.25)
    # errors that do not resemble each other, or the opposite of each other, are soon forgotten
    fit = statistics_from_pairs([0.0, 1.0], outputs[:2], [outputs[0] + errors[0], outputs[1] - errors[0]]).correction()
    assert math.exp(fit.age[0] - fit.age[1]) < 0.01


def test_a_level_that_is_asked_twice_is_no_step_on():
    generator, statistics = torch.Generator().manual_seed(4), NoiseStatistics()
    statistics.begin()
    error = torch.randn(64, 2, 8, 8, generator=generator)
    for level, kept in ((-2.0, 1.0), (-1.0, 0.6), (-1.0, 1.0), (0.0, 0.6), (0.0, 1.0)):  # as Heun asks
        error = kept * error + math.sqrt(1 - kept**2) * torch.randn(64, 2, 8, 8, generator=generator)
        output = torch.randn(64, 2, 8, 8, generator=generator)
        statistics.update(level, output, output + 0.1 * error)
    assert np.exp(-np.diff(statistics.correction().age)) == pytest.approx([0.6, 0.6], abs=0.03)


def test_a_correction_of_before_takes_errors_for_independent_and_false_clocks_are_refused():
    fit = statistics_from_pairs(*planted_pairs(0.2, [0.3, -0.1], 0.3)).correction()
    record = {key: value for key, value in fit.to_dict().items() if key != "age"} | {"version": 2}
    assert Correction.from_dict(record).age_at(0.0) is None
    for age in (fit.age[:-1], fit.age[::-1]):
        with pytest.raises(QuantDMError, match="got ages of shape"):
            replace(fit, age=age)


def test_a_file_that_is_no_correction_is_refused(tmp_path):
    from quantdm.files import save_tensors

    save_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(QuantDMError, match="expected a correction of version 3"):
        load_correction(tmp_path / "other.safetensors")
    save_tensors(tmp_path / "part.safetensors", {"k": torch.zeros(1)}, {"kind": "correction", "version": 3})
    with pytest.raises(QuantDMError, match="lacks log_snr"):
        load_correction(tmp_path / "part.safetensors")
    with pytest.raises(QuantDMError, match="no such file"):
        load_correction(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"k": -0.6}, "k > -0.5"), ({"q": -1.0}, "q >= 0"), ({"variant": "all"}, "variant 'all'"), ({"q": np.nan}, "NaN")],
)
def test_a_correction_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(QuantDMError, match=message):
        make_correction(**settings)


def test_between_fitted_steps_the_correction_is_linear_in_log_snr_and_constant_beyond():
    levels = np.array([-4.0, -1.0, 2.0])
    line = 0.1 + 0.02 * levels
    bias = np.stack([line, 2 * line], axis=1)
    correction = Correction(levels, line, bias, bias, line, variant="both+variance")
    for level in (-4.0, -3.3, -1.0, 0.7, 2.0):
        at, value = correction.at(level), 0.1 + 0.02 * level
        expected = [1 / (1 + value), value / (1 + value), value, 2 * value]
        assert [at.gain[0], at.q, *at.bias] == pytest.approx(expected, abs=1e-15)
    assert correction.at(-9.0).bias[0] == line[0]
    assert correction.at(9.0).bias[0] == line[-1]


def test_a_correction_of_a_range_leaves_other_levels_alone():
    correction = make_correction(bias=(1.0, 2.0), within=(-1.0, 3.0))
    assert not correction.at(0.0).is_nothing
    for level in (-1.1, 3.1):
        assert correction.at(level).is_nothing
        assert correction.at(level).q == 0


def test_each_variant_uses_its_own_part():
    rows = np.ones(2)
    correction = Correction(np.arange(2.0), 0.1 * rows, 2 * rows[:, None], 3 * rows[:, None], 4 * rows)
    used = {v: correction.with_variant(v).at(0.5) for v in VARIANTS if v != "variance"}
    found = {v: (round(1 / s.gain[0] - 1, 12), s.bias[0], round(s.q, 12)) for v, s in used.items()}
    assert found == {
        "none": (0, 0, 0),
        "bias": (0, 3, 0),
        "k": (0.1, 0, 0),
        "both": (0.1, 2, 0),
        "both+variance": (0.1, 2, round(4 / 1.1, 12)),
    }


# ----------------------------------------------------------------------------------------------------------- guidance


def four_parts(num=600):
    """Outputs without and with the condition, correlated, and the same with gain, bias and noise."""
    generator = torch.Generator().manual_seed(3)
    free, apart, *noises = torch.randn(4, num, 2, 4, 4, generator=generator, dtype=torch.float64)
    given = free + 0.3 * apart
    return free, given, *(1.1 * half + 0.2 + 0.05 * noise for half, noise in zip((free, given), noises, strict=True))


def guided_statistics(scale):
    """Statistics of the four parts mixed at one scale."""
    statistics = NoiseStatistics()
    free, given, free_q, given_q = four_parts()
    mixed = [(1 - scale) * a + scale * b for a, b in ((free, given), (free_q, given_q))]
    statistics.begin()
    statistics.update(0.5, *mixed, (free, given, free_q, given_q))
    return statistics.correction(model="m")


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0, 7.5])
def test_guidance_composed_afterwards_is_guidance_fitted_directly(scale):
    direct, composed = guided_statistics(scale), for_guidance(guided_statistics(3.0), scale)
    for name in ("k", "bias", "shift", "q"):
        assert np.allclose(getattr(direct, name), getattr(composed, name), rtol=1e-9, atol=1e-9)
    for name in ("r2", "k_se", "bias_se", "q_se", "count"):
        assert direct.diagnostics[name] == pytest.approx(composed.diagnostics[name], rel=1e-6)


def test_guidance_cannot_be_composed_from_one_output():
    for scale in (1.0, 5.0):
        with pytest.raises(QuantDMError, match="guidance-distilled"):
            for_guidance(make_correction(model="m"), scale)


# ------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(("sigma", "sigma_next", "q"), [(4.0, 3.2, 0.3), (1.0, 0.7, 0.1), (0.2, 0.15, 0.5)])
def test_a_lengthened_step_ends_at_the_total_variance_of_the_next_level(sigma, sigma_next, q):
    added = ((sigma - sigma_next) * q) ** 2
    factor = stretch(sigma, sigma_next, sigma_next, added)
    reached = sigma + factor * (sigma_next - sigma)
    assert factor > 1
    assert reached**2 + factor**2 * added == pytest.approx(sigma_next**2, rel=1e-12)
    disc = sigma**2 * q**4 - (1 + q**2) * (q**2 * sigma**2 - sigma_next**2)
    assert reached == pytest.approx((sigma * q**2 + math.sqrt(disc)) / (1 + q**2), rel=1e-12)


@pytest.mark.parametrize(
    ("sigma", "sigma_next", "q"),
    [(1.0, 0.0, 0.1), (1.0, 0.69, 2.0), (1.0, 0.12, 0.1), (np.inf, 50.0, 0.1), (0.7, 0.7, 0.3), (1.0, 0.5, 0.0)],
    ids=["the last step", "no real solution", "no small change", "pure noise", "goes nowhere", "no noise"],
)
def test_where_a_step_cannot_be_lengthened_the_own_step_is_taken(sigma, sigma_next, q):
    added = ((sigma - sigma_next) * q) ** 2 if np.isfinite(sigma) else 0.0
    assert stretch(sigma, sigma_next, sigma_next, added) == 1.0


def test_noise_kept_and_noise_absorbed_are_the_spare_variance():
    for spare in (0.3, torch.tensor([0.3, 2.0], dtype=torch.float64)):
        kept = kept_std(spare, 0.1)
        assert torch.allclose(torch.as_tensor(kept**2 * spare + 0.1), torch.as_tensor(spare), rtol=1e-12)
    assert kept_std(0.3, 0.4) == 0.0
    assert kept_std(0.0, 0.4) == 1.0
    assert ddim_variance(np.inf, 2.0, 0.5) == pytest.approx(1.0)
    assert Move(2.0, 1.0, 1.0, 4 * EXCESS_LIMIT).occupancy == 4 * EXCESS_LIMIT


# ------------------------------------------------------------------------------------------------------------- rivals


def test_every_rival_is_its_published_form():
    steps, outputs, noisy = planted_pairs(0.2, [0.3, -0.1], 0.3)
    fit = statistics_from_pairs(steps, outputs, noisy).correction()
    assert {name.split(".")[0] for name in fit.rivals} == {"variance", *RIVALS}
    m, quantized = (values[1].transpose(0, 1).flatten(1) for values in (outputs, noisy))
    at = {name: fit.with_variant(name).at(LEVELS[1]) for name in RIVALS}
    assert at["ptqd"].gain == pytest.approx([1 / 1.2] * 2, rel=0.01)
    assert at["ptqd"].q == pytest.approx(0.3 / 1.2, rel=0.02)
    shrunk = torch.stack([torch.cov(torch.stack([a, b])) for a, b in zip(m, quantized, strict=True)]).sum(0)
    assert at["mmse"].gain == pytest.approx([float(shrunk[0, 1] / shrunk[1, 1])] * 2, rel=1e-6)
    at["variance"] = fit.with_variant("variance").at(LEVELS[1])
    for name in ("stepbaq", "qdrift", "variance"):
        assert at[name].is_nothing
        assert at[name].q == pytest.approx(math.hypot(0.3, 0.2), rel=0.02)
    assert at["tcec"].gain == pytest.approx(((m * quantized).sum(1) / quantized.square().sum(1)).numpy(), rel=1e-9)
    least = 0.05 * outputs[1].abs().amax()
    safe = torch.where(m.abs() < least, torch.where(m < 0, -least, least), m)
    ratio = quantized / safe
    upper, lower = (
        0.5 * (quantized * w).mean(1) + 0.5 * r.mean(1) + 0.1 for w, r in ((m, ratio), (quantized, ratio**2))
    )
    assert at["tac"].gain == pytest.approx((upper / lower).numpy(), rel=1e-9)


def test_ptqd_clamps_a_negative_slope():
    mean, second = np.zeros((2, 1)), np.array([[[1.0], [-0.2]], [[-0.2], [0.05]]])
    gain, _, q = rival_tables(mean, second, np.ones((2, 1)), -0.2, (0.05**0.5, 0.1))["ptqd"]
    assert gain[0] == 1.0
    assert q == pytest.approx(0.05**0.5)
    with pytest.raises(QuantDMError, match="no table of 'tac'"):
        make_correction(variant="tac")
