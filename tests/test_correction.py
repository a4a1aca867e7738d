"""Noise statistics recover what was planted; corrected steps keep the schedule's variance."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from quantdm.correction import (
    VARIANTS,
    CorrectedDDIMScheduler,
    CorrectedDDPMScheduler,
    Correction,
    NoiseStatistics,
    load_correction,
    statistics_from_pairs,
    step_table,
)
from quantdm.correction.variance import deterministic_stretch, deterministic_target, log_snr, noise_level
from quantdm.errors import QuantDMError

ALPHAS = DDIMScheduler().alphas_cumprod
CORRECTED = {DDIMScheduler: CorrectedDDIMScheduler, DDPMScheduler: CorrectedDDPMScheduler}


def make_correction(timesteps, *, k=0.1, q=0.1, bias=(0.0, 0.0), variant="both+variance", alphas=ALPHAS, **labels):
    """A correction whose numbers are the same at every timestep."""
    rows = np.ones(len(timesteps))
    levels = np.array([log_snr(float(alphas[t])) for t in timesteps])
    bias = rows[:, None] * np.array(bias)
    return Correction(np.array(timesteps), levels, k * rows, bias, bias, q * rows, variant=variant, **labels)


def make_scheduler(plain, correction, *, steps, eta=0.0, **settings):
    """The plain scheduler (correction None) or its corrected class, ready to step; predictions are not clipped."""
    scheduler = plain(clip_sample=False, **settings)
    if correction is not None:
        record = {"correction": correction.to_dict(), "eta": eta}
        scheduler = CORRECTED[plain].from_config({**scheduler.config, "_quantdm": record})
    scheduler.set_timesteps(steps)
    return scheduler


def planted_pairs(k, bias, sigma, *, steps=(800, 600, 400), num=400, lag=0.0):
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
    fit = statistics_from_pairs(*planted_pairs(k, [0.3, -0.1], 0.0)).correction(ALPHAS)
    assert fit.k == pytest.approx([k] * 3, abs=1e-10)
    assert np.allclose(fit.bias, [[0.3, -0.1]] * 3, atol=1e-10)
    assert fit.q == pytest.approx([0.0] * 3, abs=1e-7)
    assert fit.diagnostics["r2"] == pytest.approx([1.0] * 3)


def test_planted_noise_is_recovered_with_its_lag():
    fit = statistics_from_pairs(*planted_pairs(0.2, [0.3, -0.1], 0.3, lag=0.6)).correction(ALPHAS)
    assert list(fit.timesteps) == [800, 600, 400]
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
    fit = statistics_from_pairs(steps, outputs, noisy).correction(ALPHAS)
    assert (fit.q > 2 * fit.diagnostics["q_robust"]).all()


@pytest.mark.parametrize(
    ("k", "sigma"), [(0.05, 0.3), (-0.7, 0.1)], ids=["explains too little", "turns the output over"]
)
def test_a_slope_that_is_not_trusted_is_left_in_the_rest(k, sigma):
    fit = statistics_from_pairs(*planted_pairs(k, [0.3, -0.1], sigma)).correction(ALPHAS)
    assert not fit.k.any()
    assert np.array_equal(fit.bias, fit.shift)
    assert fit.q == pytest.approx([(k**2 + sigma**2) ** 0.5] * 3, rel=0.02)


def test_a_slope_of_few_samples_is_not_significant():
    m, noise = torch.tensor([[-1.0, -1.0, 1.0, 1.0], [1.0, -1.0, 1.0, -1.0]])[:, :, None]
    fit = statistics_from_pairs([500], [m], [m + 0.2 * m + 0.4 * noise]).correction(ALPHAS)
    assert fit.diagnostics["r2"][0] > 0.05  # would pass by its share of variance
    assert fit.k[0] == 0


def test_outputs_that_do_not_vary_have_no_slope():
    values = torch.rand(40, 2, 1, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for m, delta in values:
        m = 1000 * m.expand(16, 2, 7, 7)
        fit = statistics_from_pairs([500], [m], [m + delta]).correction(ALPHAS)
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
    a, b = streamed.correction(ALPHAS), statistics_from_pairs(steps, outputs, noisy).correction(ALPHAS)
    for name in ("k", "bias", "shift", "q"):
        assert np.allclose(getattr(a, name), getattr(b, name), atol=1e-12)
    assert a.diagnostics["lag1"] == pytest.approx(b.diagnostics["lag1"], abs=1e-12)


def test_outputs_that_cannot_be_compared_are_refused():
    with pytest.raises(QuantDMError, match="shapes"):
        statistics_from_pairs([5], [torch.zeros(2, 3, 4)], [torch.zeros(2, 3, 5)])
    with pytest.raises(QuantDMError, match="NaN"):
        statistics_from_pairs([5], [torch.zeros(2, 3)], [torch.full((2, 3), torch.nan)])
    with pytest.raises(QuantDMError, match="no outputs"):
        NoiseStatistics().correction(ALPHAS)


# ------------------------------------------------------------------------------------------------------------- record


def test_a_saved_correction_comes_back_the_same(tmp_path):
    fit = statistics_from_pairs(*planted_pairs(0.2, [0.3, -0.1], 0.3)).correction(ALPHAS, model="m", variant="k")
    fit.measured["none"] = [0.5, 0.25]
    back = load_correction(fit.save(tmp_path / "correction.safetensors"))
    assert (back.variant, back.prediction_type, back.model) == ("k", "epsilon", "m")
    assert back.measured == {"none": [0.5, 0.25]}
    assert set(back.diagnostics) == {"r2", "k_se", "q_robust", "lag1", "count"}
    for name in ("timesteps", "log_snr", "k", "bias", "shift", "q"):
        assert np.array_equal(getattr(back, name), getattr(fit, name))
        assert np.array_equal(getattr(Correction.from_dict(fit.to_dict()), name), getattr(fit, name))
    assert all(np.array_equal(back.diagnostics[n], fit.diagnostics[n]) for n in fit.diagnostics)


def test_a_file_that_is_no_correction_is_refused(tmp_path):
    from quantdm.files import save_tensors

    save_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(QuantDMError, match="expected a correction of version 1"):
        load_correction(tmp_path / "other.safetensors")
    save_tensors(tmp_path / "part.safetensors", {"k": torch.zeros(1)}, {"kind": "correction", "version": 1})
    with pytest.raises(QuantDMError, match="lacks timesteps"):
        load_correction(tmp_path / "part.safetensors")
    with pytest.raises(QuantDMError, match="no such file"):
        load_correction(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"k": -0.6}, "k > -0.5"), ({"q": -1.0}, "q >= 0"), ({"variant": "all"}, "variant 'all'"), ({"q": np.nan}, "NaN")],
)
def test_a_correction_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(QuantDMError, match=message):
        make_correction([500, 300], **settings)


def test_between_fitted_steps_the_correction_is_linear_in_log_snr_and_constant_beyond():
    levels = np.array([-4.0, -1.0, 2.0])
    line = 0.1 + 0.02 * levels
    bias = np.stack([line, 2 * line], axis=1)
    correction = Correction(np.array([900, 500, 100]), levels, line, bias, bias, line, variant="both+variance")
    for level in (-4.0, -3.3, -1.0, 0.7, 2.0):
        at, value = correction.at(level), 0.1 + 0.02 * level
        assert [at.k, at.q, *at.bias] == pytest.approx([value, value, value, 2 * value], abs=1e-15)
    assert correction.at(-9.0).k == line[0]
    assert correction.at(9.0).k == line[-1]


def test_each_variant_uses_its_own_part():
    rows = np.ones(2)
    correction = Correction(
        np.array([9, 5]), np.array([0.0, 1.0]), 0.1 * rows, 2 * rows[:, None], 3 * rows[:, None], 4 * rows
    )
    used = {v: correction.with_variant(v).at(0.5) for v in VARIANTS}
    assert {v: (s.k, s.bias[0], s.q) for v, s in used.items()} == {
        "none": (0, 0, 0),
        "bias": (0, 3, 0),
        "k": (0.1, 0, 0),
        "both": (0.1, 2, 0),
        "both+variance": (0.1, 2, 4),
    }


# --------------------------------------------------------------------------------------------------------- schedulers

SAMPLE = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(1))
OUTPUT = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("plain", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_correcting_nothing_is_the_plain_scheduler_bit_for_bit(plain, dtype):
    base = make_scheduler(plain, None, steps=5)
    for correction in (make_correction([500], variant="none"), make_correction([500], k=0.0, q=0.0)):
        ours = make_scheduler(plain, correction, steps=5)
        for t in base.timesteps:
            etas = [{}] if plain is DDPMScheduler else [{}, {"eta": 0.7}]
            for eta in etas:
                results = [
                    s.step(OUTPUT.to(dtype), t, SAMPLE.to(dtype), generator=torch.Generator().manual_seed(5), **eta)
                    for s in (base, ours)
                ]
                assert torch.equal(results[0].prev_sample, results[1].prev_sample)
                assert torch.equal(results[0].pred_original_sample, results[1].pred_original_sample)


@pytest.mark.parametrize("plain", [DDIMScheduler, DDPMScheduler])
def test_a_corrected_step_takes_the_arguments_of_the_plain_one(plain):
    assert list(inspect.signature(CORRECTED[plain].step).parameters) == list(inspect.signature(plain.step).parameters)


@pytest.mark.parametrize("plain", [DDIMScheduler, DDPMScheduler])
def test_the_mean_correction_undoes_a_known_gain_and_bias(plain):
    base = make_scheduler(plain, None, steps=10)
    ours = make_scheduler(plain, make_correction([900, 100], bias=(0.3, -0.2), variant="both"), steps=10)
    noisy = 1.1 * OUTPUT + torch.tensor([0.3, -0.2]).view(1, 2, 1, 1)
    for t in base.timesteps:
        a = base.step(OUTPUT, t, SAMPLE, generator=torch.Generator().manual_seed(5)).prev_sample
        b = ours.step(noisy, t, SAMPLE, generator=torch.Generator().manual_seed(5)).prev_sample
        assert torch.allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("plain", "eta"), [(DDIMScheduler, 0.4), (DDIMScheduler, 1.0), (DDPMScheduler, None)])
def test_noise_kept_and_noise_absorbed_are_the_variance_of_the_schedule(plain, eta, prediction):
    q, k, gap = 0.3, 0.1, 1e-3
    correction = make_correction(range(980, -1, -20), k=k, q=q, prediction_type=prediction)
    base = make_scheduler(plain, None, steps=50, prediction_type=prediction)
    ours = make_scheduler(plain, correction, steps=50, prediction_type=prediction)
    sample, output = SAMPLE.double(), OUTPUT.double()
    acted = 0
    for t in base.timesteps[:-1]:

        def step(scheduler, output, t=t):
            settings = {} if eta is None else {"eta": eta}
            generator = torch.Generator().manual_seed(5)
            return scheduler.step(output, t, sample, generator=generator, **settings).prev_sample

        # the step is linear in the output: its slope, and with the same noise on both sides the noise it injects
        slope = ((step(ours, output + gap) - step(ours, output)) / gap).mean().item()
        corrected = step(ours, (1 + k) * output) - step(base, output)  # (sigma' - sigma) z
        z = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        sigma = _schedule_sigma(base, t, 1.0 if eta is None else eta)
        kept = sigma + (corrected / z).median().item()
        absorbed = (slope * q) ** 2
        if absorbed < sigma**2:
            assert kept**2 + absorbed == pytest.approx(sigma**2, rel=2e-3)
            acted += absorbed > 0.01 * sigma**2
        else:
            assert kept == pytest.approx(0.0, abs=1e-5)
    assert acted >= 10


def _schedule_sigma(scheduler, t, eta):
    a = float(ALPHAS[t])
    a_prev = float(ALPHAS[t - 20])
    return eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)) ** 0.5


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_deterministic_step_ends_with_the_total_variance_of_the_next_level(prediction):
    q, k, gap = 0.1, 0.1, 1e-3
    correction = make_correction(range(980, -1, -20), k=k, q=q, prediction_type=prediction)
    ours = make_scheduler(DDIMScheduler, correction, steps=50, prediction_type=prediction)
    mean_only = make_scheduler(DDIMScheduler, correction.with_variant("both"), steps=50, prediction_type=prediction)
    sample, output = SAMPLE.double(), OUTPUT.double()
    acted = 0
    for t in ours.timesteps[:-1]:
        a, a_next = float(ALPHAS[t]), float(ALPHAS[t - 20])
        level, level_next = ((1 - a) / a) ** 0.5, ((1 - a_next) / a_next) ** 0.5
        here, plain = ours.step(output, t, sample).prev_sample, mean_only.step(output, t, sample).prev_sample
        slope = ((ours.step(output + gap, t, sample).prev_sample - here) / gap).mean().item()
        excess = (slope * q) ** 2 / a_next  # what the noise adds in the coordinates x / sqrt(alpha_bar)
        stretch = ((here - sample * (a_next / a) ** 0.5) / (plain - sample * (a_next / a) ** 0.5)).median().item()
        reached = level + (level_next - level) * stretch
        if stretch > 1:
            assert reached**2 + excess == pytest.approx(level_next**2, rel=1e-3)
            acted += 1
        else:
            assert torch.equal(here, plain)
    assert acted >= 20


@pytest.mark.parametrize(
    ("sigma", "sigma_next", "q"),
    [(1.0, 0.0, 0.1), (1.0, 0.69, 1.0), (1.0, 0.12, 0.1), (np.inf, 50.0, 0.1)],
    ids=["the last step", "no real solution", "no small change", "pure noise"],
)
def test_where_the_deterministic_step_is_infeasible_the_own_step_is_taken(sigma, sigma_next, q):
    assert deterministic_target(sigma, sigma_next, q) == sigma_next


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_schedule_that_starts_at_zero_snr_keeps_its_own_first_step(eta):
    settings = {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
        "steps": 10,
    }
    alphas = DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod
    correction = make_correction([999, 500], q=0.2, prediction_type="v_prediction", alphas=alphas)
    ours = make_scheduler(DDIMScheduler, correction, eta=eta, **settings)
    mean_only = make_scheduler(DDIMScheduler, correction.with_variant("both"), eta=eta, **settings)
    steps = [
        s.step(OUTPUT, 999, SAMPLE, generator=torch.Generator().manual_seed(5)).prev_sample for s in (ours, mean_only)
    ]
    assert torch.equal(*steps)
    assert steps[0].isfinite().all()


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_step_is_finite_and_the_plain_one_where_that_is_finite(schedule, prediction):
    settings = {"beta_schedule": schedule, "prediction_type": prediction, "timestep_spacing": "trailing"}
    settings["rescale_betas_zero_snr"] = True
    alphas = DDIMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=True).alphas_cumprod
    full = make_correction([999, 500], q=0.2, prediction_type=prediction, alphas=alphas)
    for steps in (1, 2, 3, 4, 5, 7, 8, 10, 13, 20, 25, 50):
        base = make_scheduler(DDIMScheduler, None, steps=steps, **settings)
        nothing = make_scheduler(DDIMScheduler, full.with_variant("none"), steps=steps, **settings)
        corrected = make_scheduler(DDIMScheduler, full, steps=steps, **settings)
        for t in (base.timesteps[0], base.timesteps[-1]):
            for eta in (0.0, 0.5, 1.0):

                def step(scheduler, t=t, eta=eta):
                    generator = torch.Generator().manual_seed(5)
                    return scheduler.step(OUTPUT, t, SAMPLE, eta=eta, generator=generator).prev_sample

                plain, same = step(base), step(nothing)
                assert same.isfinite().all()
                assert torch.equal(same, plain) or not plain.isfinite().all()
                assert step(corrected).isfinite().all()


def test_an_eta_that_the_schedule_has_no_noise_for_is_refused():
    ours = make_scheduler(DDIMScheduler, None, steps=10)
    ours = CorrectedDDIMScheduler.from_config(ours.config)
    ours.set_timesteps(10)
    with pytest.raises(QuantDMError, match=r"got eta 2\.0, expected 0 to 1"):
        ours.step(OUTPUT, 900, SAMPLE, eta=2.0)


def test_a_step_to_its_own_noise_level_is_not_stretched():
    for alpha_bar in torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist():
        level = noise_level(alpha_bar)
        assert deterministic_target(level, level, 0.3) == pytest.approx(level)
        assert deterministic_stretch(alpha_bar, alpha_bar, 0.3) == 1.0
    for q in np.linspace(0.01, 1.0, 50):  # such a scheduler ends where it is
        correction = make_correction([500, 0], k=0.0, q=q)
        ours = make_scheduler(DDIMScheduler, correction, steps=10, set_alpha_to_one=False)
        base = make_scheduler(DDIMScheduler, None, steps=10, set_alpha_to_one=False)
        assert torch.equal(ours.step(OUTPUT, 0, SAMPLE).prev_sample, base.step(OUTPUT, 0, SAMPLE).prev_sample)


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])
def test_every_ddpm_variance_is_lowered_by_the_same_amount(kind):
    predicted = torch.full((64, 2, 4, 4), 0.3)
    correction = make_correction([980, 20], q=0.05)
    lowered = []
    for variance_type in ("fixed_small", kind):
        base = make_scheduler(DDPMScheduler, None, steps=50, variance_type=variance_type)
        ours = make_scheduler(DDPMScheduler, correction, steps=50, variance_type=variance_type)
        values = [s._get_variance(400, predicted_variance=predicted) for s in (base, ours)]
        if variance_type == "learned_range":
            values = [v.exp().mean() for v in values]
        if variance_type == "fixed_small_log":
            values = [v**2 for v in values]
        lowered.append(float(values[0] - values[1]))
    assert lowered[0] > 0
    assert lowered[1] == pytest.approx(lowered[0], rel=1e-3)


def test_the_variance_channels_of_a_ddpm_output_are_left_alone():
    settings = {"steps": 10, "variance_type": "learned_range"}
    base = make_scheduler(DDPMScheduler, None, **settings)
    ours = make_scheduler(DDPMScheduler, make_correction([900, 100], k=0.25, variant="k"), **settings)
    output = torch.cat([OUTPUT, OUTPUT.flip(0)], dim=1)
    scaled = torch.cat([1.25 * OUTPUT, OUTPUT.flip(0)], dim=1)
    a = base.step(output, 500, SAMPLE, generator=torch.Generator().manual_seed(5)).prev_sample
    b = ours.step(scaled, 500, SAMPLE, generator=torch.Generator().manual_seed(5)).prev_sample
    assert torch.allclose(a, b, atol=1e-5)


def test_a_default_eta_is_used_only_when_the_pipeline_passes_none():
    base = make_scheduler(DDIMScheduler, None, steps=10)
    ours = make_scheduler(DDIMScheduler, make_correction([500], variant="none"), steps=10, eta=1.0)

    def step(scheduler, **settings):
        return scheduler.step(OUTPUT, 500, SAMPLE, generator=torch.Generator().manual_seed(5), **settings).prev_sample

    assert torch.equal(step(ours), step(base, eta=1.0))
    assert torch.equal(step(ours, eta=0.0), step(base))


def test_a_correction_for_other_channels_is_refused_at_the_first_step():
    scheduler = make_scheduler(DDIMScheduler, make_correction([500], bias=(0.0,) * 3, model="other"), steps=10)
    with pytest.raises(QuantDMError, match="'other' is for 3 channels"):
        scheduler.step(OUTPUT, 500, SAMPLE)


@pytest.mark.parametrize(("plain", "eta"), [(DDIMScheduler, 0.0), (DDIMScheduler, 1.0), (DDPMScheduler, 0.0)])
def test_the_step_table_tells_what_share_of_the_variance_is_absorbed(plain, eta):
    scheduler = make_scheduler(plain, None, steps=3)
    small, large = (step_table(make_correction([980, 500, 20], q=q), scheduler, 25, eta=eta) for q in (0.01, 0.02))
    assert [row["timestep"] for row in small] == list(range(960, -1, -40))
    for a, b in zip(small, large, strict=True):
        assert b["occupancy"] == pytest.approx(4 * a["occupancy"])
        assert a["k"] == pytest.approx(0.1)
    assert sum(row["feasible"] for row in small) > 20
    assert scheduler.num_inference_steps == 3


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("plain", "eta"), [(DDIMScheduler, 0.0), (DDIMScheduler, 1.0), (DDPMScheduler, 0.0)])
def test_the_step_table_is_finite_at_zero_snr(plain, eta, prediction):
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": prediction}
    scheduler = make_scheduler(plain, None, steps=10, **settings)
    correction = make_correction([999, 500], prediction_type=prediction, alphas=scheduler.alphas_cumprod)
    rows = step_table(correction, scheduler, 10, eta=eta)
    assert all(np.isfinite(value) for row in rows for value in row.values())


# ---------------------------------------------------------- a sampler whose score is exact: a mixture of two Gaussians

WEIGHTS, MEANS, STDS = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.7], [-1.2, 0.8], [0.3, 0.2]))
TOY_STEPS, TOY_K, TOY_Q = 50, 0.05, 0.3


def exact_epsilon(x, alpha_bar):
    """Noise prediction of the mixture's exact score at x [N, 1]."""
    var = alpha_bar * STDS**2 + 1 - alpha_bar
    distance = x[..., None] - alpha_bar**0.5 * MEANS
    posterior = (WEIGHTS.log() - 0.5 * distance**2 / var - 0.5 * var.log()).softmax(-1)
    return (1 - alpha_bar) ** 0.5 * (posterior * distance / var).sum(-1)


def sample_toy(plain, eta, correction, *, quantized, num=20_000):
    scheduler = make_scheduler(plain, correction, steps=TOY_STEPS, eta=eta)
    noise, rounding = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    x = torch.randn(num, 1, generator=noise, dtype=torch.float64)
    for t in scheduler.timesteps:
        e = exact_epsilon(x, ALPHAS[t].double())
        if quantized:
            e = (1 + TOY_K) * e + TOY_Q * torch.randn(x.shape, generator=rounding, dtype=torch.float64)
        x = scheduler.step(e, t, x, generator=noise).prev_sample
    return x.flatten().sort().values


@pytest.mark.parametrize(
    ("plain", "eta"), [(DDIMScheduler, 0.0), (DDIMScheduler, 1.0), (DDPMScheduler, 0.0)], ids=["ode", "eta1", "ddpm"]
)
def test_on_an_exact_score_each_part_brings_the_samples_nearer_and_shrinkage_takes_them_away(plain, eta):
    def corrected(variant, k=TOY_K):
        return make_correction(range(980, -1, -20), k=k, q=TOY_Q, bias=(0.0,), variant=variant)

    none = corrected("none")
    exact = sample_toy(plain, eta, none, quantized=False)

    def distance(correction):
        return (sample_toy(plain, eta, correction, quantized=True) - exact).abs().mean().item()  # W1

    shrinkage = corrected("both", k=TOY_K + TOY_Q**2 / (1 + TOY_K))  # the posterior mean of e ~ N(0, 1)
    w1 = [distance(c) for c in (corrected("both+variance"), corrected("both"), none, shrinkage)]
    assert w1[0] < 0.5 * w1[1] < 0.5 * 0.6 * w1[2] < 0.5 * 0.6 * 0.6 * w1[3], w1
