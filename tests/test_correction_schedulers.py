"""Every scheduler of diffusers: nothing changes where nothing is corrected, and what is planted is undone."""

import importlib.util
import inspect
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from quantdm.correction import SERVED, Correction, apply_correction, corrected_class, is_served, step_table
from quantdm.correction.corrected import KEY
from quantdm.correction.levels import level_of, prediction_of
from quantdm.correction.steps import step_arguments, steps_of
from quantdm.correction.variance import epsilon_units
from quantdm.errors import QuantDMError
from tests.test_correction import make_correction

SAMPLE = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(1))
OUTPUT = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(2))
# diffusers: KDPM2 hands tensors to numpy, LMS warns of what is called here
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__", "ignore:The `scale_model_input`")
PLAIN = {name: getattr(diffusers, name) for name in SERVED}
# Two need torchsde for their noise; it is no dependency.
HERE = [name for name in SERVED if name not in ("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler")]


def make_scheduler(name, correction, *, steps=10, eta=0.0, **settings):
    """The plain scheduler (correction None) or its corrected class, ready to step; predictions are not clipped."""
    plain = PLAIN[name]
    config = {"clip_sample": False, **settings} if "clip_sample" in inspect.signature(plain).parameters else settings
    scheduler = plain(**config)
    if correction is not None:
        record = {"correction": correction.to_dict(), "eta": eta}
        scheduler = corrected_class(plain).from_config({**scheduler.config, KEY: record})
    scheduler.set_timesteps(num_inference_steps=2 if name == "SCMScheduler" else steps)
    return scheduler


def trajectory(scheduler, network, *, sample=SAMPLE, **arguments):
    """The samples after every step."""
    generator, found = torch.Generator().manual_seed(5), []
    torch.manual_seed(5)
    for i, t in enumerate(steps_of(scheduler)):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, t)
        given = {**step_arguments(scheduler, network(sample, i), t, sample), **arguments}
        if "generator" in inspect.signature(scheduler.step).parameters:
            given["generator"] = generator
        result = scheduler.step(**given)
        sample = result[0] if isinstance(result, tuple) else result.prev_sample
        found.append(sample)
    return torch.stack(found)


def network(sample, i):
    return torch.sin(0.2 * sample + i)


@pytest.fixture(autouse=True)
def _own_random_state():
    with torch.random.fork_rng():
        yield


@pytest.mark.parametrize("name", HERE)
def test_correcting_nothing_is_the_plain_scheduler_bit_for_bit(name):
    predicts = {"prediction_type": prediction_of(make_scheduler(name, None))}
    base = trajectory(make_scheduler(name, None), network)
    for correction in (
        make_correction(variant="none", bias=(0.3, 0.1), **predicts),
        make_correction(k=0.0, q=0.0, **predicts),
    ):
        assert torch.equal(trajectory(make_scheduler(name, correction), network), base)
    corrected = trajectory(make_scheduler(name, make_correction(bias=(0.3, 0.1), **predicts)), network)
    assert corrected.isfinite().all()
    assert not torch.equal(corrected, base)


@pytest.mark.parametrize("name", HERE)
def test_the_mean_correction_undoes_a_known_gain_and_bias_and_keeps_the_signature(name):
    predicts = prediction_of(make_scheduler(name, None))
    ours = make_scheduler(name, make_correction(bias=(0.3, -0.2), variant="both", prediction_type=predicts))
    assert inspect.signature(type(ours).step) == inspect.signature(PLAIN[name].step)
    bias = torch.tensor([0.3, -0.2]).view(1, 2, 1, 1)
    base = trajectory(make_scheduler(name, None), network)
    found = trajectory(ours, lambda sample, i: 1.1 * network(sample, i) + bias)
    assert torch.allclose(found, base, atol=1e-3 * base.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_half_precision_stays_what_it_is(name, dtype):
    runs = [
        trajectory(make_scheduler(name, c), lambda x, i: network(x, i).to(dtype), sample=SAMPLE.to(dtype))
        for c in (None, make_correction(k=0.0, q=0.0), make_correction(k=0.1))
    ]
    assert torch.equal(runs[0], runs[1])
    assert runs[2].dtype == runs[0].dtype
    assert runs[2].isfinite().all()


@pytest.mark.parametrize("spacing", [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_levels_fall_to_the_image_in_any_spacing(name, spacing):
    scheduler = make_scheduler(name, None, **spacing)
    found = []
    for i, t in enumerate(scheduler.timesteps):
        found.append(level_of(scheduler, t))
        scheduler.step(network(SAMPLE, i), t, SAMPLE)
    assert (np.diff([level.log_snr for level in found]) > 0).all()
    assert all(
        level.sigma == pytest.approx(float(s), rel=1e-5) for level, s in zip(found, scheduler.sigmas, strict=False)
    )


# ------------------------------------------------------------------------------------------------- variance of a step


def planted_gap(name, correction, *, arguments=None, steps=50, **settings):
    """Per step: what it did, how making room changed its end, and the slope of its end in the output.

    A step is linear in the output; with the same draws on both sides, what it injects shows as a difference.
    """
    sample, output, gap = SAMPLE[:8].double(), OUTPUT[:8].double(), 1e-3
    mean_only = correction.with_variant("both")
    walks = {key: make_scheduler(name, c, steps=steps, **settings) for key, c in
             {"full": correction, "gap": correction, "mean": mean_only, "silent": mean_only}.items()}  # fmt: skip
    given = {**(arguments or {}), "generator": None}
    rows = []
    for t in walks["full"].timesteps[:-1]:
        found = {}
        for key, scheduler in walks.items():
            torch.manual_seed(5)
            out = output + gap if key == "gap" else output
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(sample, t)
            found[key] = scheduler.step(out, t, sample, **given, return_dict=False)[0].double()
        did = walks["full"].did
        rows.append((did, found["full"] - found["mean"], (found["gap"] - found["full"]).mean().item() / gap))
    return rows


@pytest.mark.parametrize(
    ("name", "arguments", "settings"),
    [
        ("DDIMScheduler", {"eta": 1.0}, {}),
        ("DDIMScheduler", {"eta": 0.4}, {"prediction_type": "v_prediction"}),
        ("DDPMScheduler", {}, {}),
        ("DDPMScheduler", {}, {"prediction_type": "sample"}),
        ("EulerAncestralDiscreteScheduler", {}, {}),
        ("DPMSolverMultistepScheduler", {}, {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
        ("LCMScheduler", {}, {}),
        ("TCDScheduler", {"eta": 0.3}, {}),
        ("FlowMatchEulerDiscreteScheduler", {}, {"stochastic_sampling": True}),
    ],
)
def test_noise_kept_and_noise_absorbed_are_the_variance_of_the_schedule(name, arguments, settings):
    predicts = prediction_of(make_scheduler(name, None, **settings))
    correction = make_correction(k=0.1, q=0.1, prediction_type=predicts)
    acted = 0
    for did, change, _ in planted_gap(name, correction, arguments=arguments, **settings):
        if did.move is None or not did.move.has_spare or did.move.added >= did.move.spare:
            continue
        assert did.room.noise**2 * did.move.spare + did.move.added == pytest.approx(did.move.spare, rel=1e-6)
        if did.room.noise == 1.0:
            continue  # from pure noise
        torch.manual_seed(5)
        dtype = torch.float32 if name in ("DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler") else None
        fresh = torch.randn(change.shape, dtype=dtype or torch.float64).double()
        signal = _next_signal(change, fresh, did)
        assert change.std() <= 1e-4 or signal == pytest.approx(_signal_of(did.move.sigma_next, name), rel=2e-3)
        acted += 1
    assert acted >= 10


def _next_signal(change, fresh, did):
    """What the change of the injected noise is multiplied with: the signal of the next level."""
    return (change / fresh).median().item() / ((did.room.noise - 1) * did.move.spare**0.5)


def _signal_of(sigma, name):
    if "Euler" in name and "Flow" not in name:
        return 1.0
    return 1 / (1 + sigma) if "Flow" in name else 1 / (1 + sigma**2) ** 0.5


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DDIMScheduler", {}),
        ("EulerDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"solver_order": 1}),
        ("FlowMatchEulerDiscreteScheduler", {}),
    ],
)
def test_the_noise_that_a_step_is_said_to_add_is_what_it_adds(name, settings, prediction):
    if "Flow" not in name:
        settings = {**settings, "prediction_type": prediction}
    predicts = prediction_of(make_scheduler(name, None, **settings))
    correction = make_correction(k=0.1, q=0.1, prediction_type=predicts)
    acted = 0
    for did, _, slope in planted_gap(name, correction, **settings):
        if did.room is None or did.room.length <= 1.0:
            continue
        std = slope * 0.1 / _signal_of(did.move.sigma_next, name)  # of the noise that a step has at its end
        reached = did.move.sigma + did.room.length * (did.move.target - did.move.sigma)
        assert reached**2 + std**2 == pytest.approx(did.move.sigma_next**2, rel=1e-3)
        assert did.q == pytest.approx(0.1 / 1.1 * epsilon_units(predicts, did.level.sigma))
        acted += 1
    assert acted >= 15


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_schedule_that_starts_at_zero_snr_keeps_its_own_first_step(eta):
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    correction = make_correction(q=0.2, prediction_type="v_prediction")
    steps = [
        make_scheduler("DDIMScheduler", c, eta=eta, **settings).step(
            OUTPUT, 999, SAMPLE, generator=torch.Generator().manual_seed(5)
        )
        for c in (correction, correction.with_variant("both"))
    ]
    assert torch.equal(*(step.prev_sample for step in steps))
    assert steps[0].prev_sample.isfinite().all()


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_step_is_finite_and_the_plain_one_where_that_is_finite(schedule, prediction):
    settings = {"beta_schedule": schedule, "prediction_type": prediction, "timestep_spacing": "trailing"}
    settings["rescale_betas_zero_snr"] = True
    full = make_correction(q=0.2, prediction_type=prediction)
    for steps in (1, 3, 7, 10, 25):
        base, nothing, corrected = (
            make_scheduler("DDIMScheduler", c, steps=steps, **settings) for c in (None, full.with_variant("none"), full)
        )
        for t in (base.timesteps[0], base.timesteps[-1]):
            for eta in (0.0, 0.5, 1.0):

                def step(scheduler, t=t, eta=eta):
                    generator = torch.Generator().manual_seed(5)
                    return scheduler.step(OUTPUT[:4], t, SAMPLE[:4], eta=eta, generator=generator).prev_sample

                plain, same = step(base), step(nothing)
                assert same.isfinite().all()
                assert torch.equal(same, plain) or not plain.isfinite().all()
                assert step(corrected).isfinite().all()


def test_an_eta_that_the_schedule_has_no_noise_for_is_refused():
    ours = make_scheduler("DDIMScheduler", make_correction(variant="none"))
    with pytest.raises(QuantDMError, match=r"got eta 2\.0, expected 0 to 1"):
        ours.step(OUTPUT, 900, SAMPLE, eta=2.0)


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])
def test_every_ddpm_variance_is_lowered_by_the_same_amount(kind):
    output = torch.cat([OUTPUT, torch.full_like(OUTPUT, 0.3)], dim=1) if kind == "learned_range" else OUTPUT
    lowered = []
    for variance_type, out in (("fixed_small", OUTPUT), (kind, output)):
        runs = {}
        for label, correction in (("base", make_correction(k=0.0, q=0.0)), ("ours", make_correction(k=0.0, q=0.05))):
            scheduler = make_scheduler("DDPMScheduler", correction, steps=50, variance_type=variance_type)
            runs[label] = [
                scheduler.step(out, 400, SAMPLE, generator=torch.Generator().manual_seed(seed)).prev_sample
                for seed in (5, 6)
            ]
        stds = [(a - b).double().std().item() for a, b in runs.values()]
        lowered.append(stds[0] ** 2 - stds[1] ** 2)
    assert lowered[0] > 0
    assert lowered[1] == pytest.approx(lowered[0], rel=2e-2)


def test_the_variance_channels_of_a_ddpm_output_are_left_alone():
    settings = {"steps": 10, "variance_type": "learned_range"}
    base = make_scheduler("DDPMScheduler", None, **settings)
    ours = make_scheduler("DDPMScheduler", make_correction(k=0.25, variant="k"), **settings)
    output = torch.cat([OUTPUT, OUTPUT.flip(0)], dim=1)
    scaled = torch.cat([1.25 * OUTPUT, OUTPUT.flip(0)], dim=1)
    a = base.step(output, 500, SAMPLE, generator=torch.Generator().manual_seed(5)).prev_sample
    b = ours.step(scaled, 500, SAMPLE, generator=torch.Generator().manual_seed(5)).prev_sample
    assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("axis", [-1, 2])
def test_channels_may_be_the_last_axis_or_behind_the_frames(axis):
    correction = make_correction(k=0.0, bias=(0.3, -0.2), variant="both", axis=axis)
    place = axis % 4
    sample, output = SAMPLE.movedim(1, place), OUTPUT.movedim(1, place)
    bias = torch.tensor([0.3, -0.2]).view([2 if dim == place else 1 for dim in range(4)])
    base, ours = make_scheduler("DDIMScheduler", None), make_scheduler("DDIMScheduler", correction)
    a, b = base.step(output, 500, sample).prev_sample, ours.step(output + bias, 500, sample).prev_sample
    assert torch.allclose(a, b, atol=1e-6)


def test_a_default_eta_is_used_only_when_the_pipeline_passes_none():
    base = make_scheduler("DDIMScheduler", None)
    ours = make_scheduler("DDIMScheduler", make_correction(variant="none"), eta=1.0)

    def step(scheduler, **settings):
        return scheduler.step(OUTPUT, 500, SAMPLE, generator=torch.Generator().manual_seed(5), **settings).prev_sample

    assert torch.equal(step(ours), step(base, eta=1.0))
    assert torch.equal(step(ours, eta=0.0), step(base))


def test_noise_that_is_given_is_lowered_like_noise_that_is_drawn():
    ours = [make_scheduler("DDIMScheduler", make_correction(q=0.3)) for _ in range(2)]
    noise = torch.randn(SAMPLE.shape, generator=torch.Generator().manual_seed(5))
    given = ours[0].step(OUTPUT, 500, SAMPLE, eta=1.0, variance_noise=noise).prev_sample
    drawn = ours[1].step(OUTPUT, 500, SAMPLE, eta=1.0, generator=torch.Generator().manual_seed(5)).prev_sample
    assert torch.allclose(given, drawn, atol=1e-6)


def test_a_correction_for_other_channels_is_refused_at_the_first_step():
    scheduler = make_scheduler("DDIMScheduler", make_correction(bias=(0.0,) * 3, model="other"))
    with pytest.raises(QuantDMError, match="'other' is for 3 channels"):
        scheduler.step(OUTPUT, 500, SAMPLE)


def test_one_noise_level_per_token_is_refused():
    correction = make_correction(prediction_type="flow_prediction")
    scheduler = make_scheduler("FlowMatchEulerDiscreteScheduler", correction)
    with pytest.raises(QuantDMError, match="per_token_timesteps"):
        scheduler.step(OUTPUT, scheduler.timesteps[0], SAMPLE, per_token_timesteps=torch.ones(64, 2))


@pytest.mark.parametrize("name", HERE)
def test_the_step_table_tells_what_share_of_the_variance_is_absorbed(name):
    scheduler = make_scheduler(name, None, steps=5)
    predicts, before = prediction_of(scheduler), scheduler.timesteps.clone()
    steps = 2 if name == "SCMScheduler" else 25
    small, large = (step_table(make_correction(q=q, prediction_type=predicts), scheduler, steps) for q in (0.01, 0.02))
    assert all(np.isfinite(value) for row in small for value in row.values())
    for a, b in zip(small, large, strict=True):
        assert b["occupancy"] == pytest.approx(4 * a["occupancy"])
        assert a["k"] == pytest.approx(0.1)
    assert torch.equal(scheduler.timesteps, before)


@pytest.mark.parametrize("name", ["VQDiffusionScheduler", "ScoreSdeVeScheduler", "AmusedScheduler"])
def test_a_scheduler_without_a_noise_prediction_is_refused_with_the_list(name):
    class Holder(DiffusionPipeline):
        def __init__(self, scheduler):
            super().__init__()
            self.register_modules(scheduler=scheduler)

    plain = getattr(diffusers, name)
    scheduler = plain(num_vec_classes=4) if name == "VQDiffusionScheduler" else (
        plain(mask_token_id=1) if name == "AmusedScheduler" else plain())  # fmt: skip
    assert not is_served(scheduler)
    with pytest.raises(QuantDMError, match=f"got scheduler {name}, expected one of .*DDIMScheduler.*UniPC"):
        apply_correction(Holder(scheduler), None)
    with pytest.raises(QuantDMError, match="Holder has no scheduler"):
        apply_correction(Holder(None), None)


# ------------------------------------------------------------------------------- a sampler whose score is exact


def load_toy():
    path = Path(__file__).parents[1] / "eval" / "correction_toy.py"
    spec = importlib.util.spec_from_file_location("correction_toy", path)
    assert spec is not None
    assert spec.loader is not None
    toy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toy)
    return toy


TOY = load_toy()


@pytest.mark.parametrize("steps", TOY.STEPS)
@pytest.mark.parametrize("sampler", TOY.SAMPLERS, ids=lambda sampler: sampler.name)
def test_on_an_exact_score_the_corrected_samples_are_those_of_full_precision(sampler, steps):
    found = TOY.distances(sampler, steps, ("none", "both+variance"), 2000, floor_seeds=(10,))
    full, none = found["both+variance"], found["none"]
    # the noise of the last output stays in the image, whatever is done before
    assert full <= max(1.5 * found["floor"], 0.15 * none, 1.5 * found["last"])
    assert full <= none


@pytest.mark.parametrize("name", TOY.REMEMBERING)
def test_on_an_exact_score_room_is_made_for_errors_that_add_up(name):
    found = TOY.remembered(next(s for s in TOY.SAMPLERS if s.name == name), 50, 10_000)
    assert found["memory"] < 0.5 * min(found["none"], found["independent"]), found


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_steps_that_start_beside_the_end_of_the_last_remember_too(spacing):
    sampler = TOY.Sampler("DDIM", "DDIMScheduler", {"timestep_spacing": spacing}, {"eta": 0.0})
    found = TOY.remembered(sampler, 30, 10_000)
    assert found["memory"] < 0.5 * min(found["none"], found["independent"]), found


def test_on_an_exact_score_shrinkage_takes_the_samples_away():
    sampler = next(s for s in TOY.SAMPLERS if s.name == "DDIM, eta 0")
    base = TOY.planted(sampler, "both")
    shrunk = Correction(
        base.log_snr, base.k + TOY.Q**2 / (1 + TOY.K), base.bias, base.shift, base.q, variant="both"
    )  # the posterior mean of e ~ N(0, 1)
    exact = TOY.sample(sampler, 50, None, noisy="", seed=0, num=20_000)
    w1 = [
        TOY.w1(exact, TOY.sample(sampler, 50, c, noisy="all", seed=0, num=20_000))
        for c in (TOY.planted(sampler, "both+variance"), base, TOY.planted(sampler, "none"), shrunk)
    ]
    assert w1[0] < 0.5 * w1[1] < 0.5 * 0.6 * w1[2] < 0.5 * 0.6 * 0.7 * w1[3], w1
