"""The fit on real tiny pipelines: the full-precision trajectory, any guidance, the choice by outcome, saving."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    AmusedScheduler,
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from torch import nn

from quantdm.correction import (
    RIVALS,
    Correction,
    NoiseStatistics,
    apply_correction,
    choose_variant,
    collect_,
    corrected_class,
    fit_correction,
    for_guidance,
    remove_correction,
)
from quantdm.correction.corrected import CorrectedScheduler
from quantdm.correction.fit import glanced
from quantdm.errors import QuantDMError

STEPS = 4
FLOW = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")


def disturbed(denoiser, gain, bias, noise=0.0):
    """A copy of a denoiser whose outputs a quantizer might have changed: gain, bias and noise of a fixed seed."""
    generator = torch.Generator().manual_seed(0)

    def disturb(_module, _args, output):
        exact = output[0]
        changed = (1 + gain) * exact + bias + noise * torch.randn(exact.shape, generator=generator)
        return (changed,) if isinstance(output, tuple) else type(output)(sample=changed)

    other = copy.deepcopy(denoiser)
    other.register_forward_hook(disturb)
    return other


def watched(denoiser, inputs):
    """The same denoiser; it notes the samples it is given."""
    denoiser.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].clone()))
    return denoiser


def make_vae():
    return AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        latent_channels=4, norm_num_groups=4, sample_size=8,
    ).eval()  # fmt: skip


def make_dit(scheduler=None):
    """A DiTPipeline with random weights whose output is not all zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
            patch_size=2,
        ).eval()  # fmt: skip
        nn.init.normal_(transformer.proj_out_2.weight, std=0.3)
        pipe = DiTPipeline(transformer, make_vae(), scheduler or DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_sd():
    """A StableDiffusionPipeline with random weights, fed with prompt embeddings."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(8, 16), layers_per_block=1,
            norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2,
        ).eval()  # fmt: skip
        pipe = StableDiffusionPipeline(
            make_vae(), None, None, unet, DDIMScheduler(clip_sample=False), None, None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dit_run(seed, *, num=4, guidance_scale=3.0):
    """Generate with DiT; the noise of its steps comes from the global generator, as the pipeline passes none."""

    def run(pipe):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            generators = [torch.Generator().manual_seed(seed + i) for i in range(num)]
            return pipe(
                list(range(num)), guidance_scale, generators, num_inference_steps=STEPS, output_type="pt"
            ).images

    return run


def sd_run(seed, *, num=3, eta=0.0):
    def run(pipe):
        embeds = torch.randn(2, num, 5, 8, generator=torch.Generator().manual_seed(9))
        return pipe(
            prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], guidance_scale=5.0, num_inference_steps=STEPS,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(num)], output_type="latent", eta=eta,
        ).images  # fmt: skip

    return run


def mse(images, reference):
    return (images - reference).square().mean().item()


@pytest.mark.parametrize(
    ("pipe", "run", "eta"),
    [
        (make_dit(), dit_run(3), 0.0),
        (make_dit(), dit_run(3, guidance_scale=1.0), 0.0),
        (make_dit(), dit_run(3), 1.0),
        (make_dit(DDPMScheduler(clip_sample=False)), dit_run(3), 0.0),
        (make_sd(), sd_run(3), 0.0),
        (make_sd(), sd_run(3, eta=1.0), 0.0),
        (make_dit(DDIMScheduler(clip_sample=False, prediction_type="v_prediction")), dit_run(3), 0.0),
        (make_dit(DDPMScheduler(clip_sample=False, prediction_type="sample")), dit_run(3), 0.0),
        (make_dit(UniPCMultistepScheduler()), dit_run(3), 0.0),
        (make_dit(EulerAncestralDiscreteScheduler()), dit_run(3), 0.0),
        (
            make_dit(DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")),
            dit_run(3),
            0.0,
        ),
    ],
    ids=[
        "dit",
        "dit without guidance",
        "dit eta 1",
        "dit ddpm",
        "sd",
        "sd eta 1",
        "v",
        "sample",
        "unipc",
        "euler a",
        "flow",
    ],
)
def test_a_gain_and_bias_of_the_denoiser_are_found_behind_the_guidance(pipe, run, eta):
    own = pipe.scheduler
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    denoiser = getattr(pipe, name)
    quantized = disturbed(denoiser, gain=0.2, bias=0.05)
    fit = fit_correction(pipe, quantized, fit_runs=[run], variant="both", eta=eta, model="tiny")
    assert len(fit.log_snr) == STEPS
    assert fit.k == pytest.approx([0.2] * STEPS, abs=1e-4)  # guidance is linear, so a gain stays the same gain
    assert np.allclose(fit.bias, 0.05, atol=1e-4)  # and its weights sum to 1, so a bias the same bias
    assert fit.q.max() < 1e-4
    assert fit.prediction_type == pipe.scheduler.config.prediction_type
    guided = for_guidance(fit, 6.0) if fit.components else fit
    assert guided.k == pytest.approx([0.2] * STEPS, abs=1e-4)
    assert pipe.scheduler is own
    assert getattr(pipe, name) is denoiser
    assert "step" not in vars(own)


def test_planted_noise_is_recovered_within_its_errors_at_the_guidance_of_the_fit_and_at_others():
    pipe = make_dit()
    quantized = disturbed(pipe.transformer, gain=0.2, bias=0.05, noise=0.02)
    fit = fit_correction(pipe, quantized, fit_runs=[dit_run(3, num=8)], variant="both+variance")
    for scale in (3.0, 1.5):
        found, q = for_guidance(fit, scale), 0.02 * (scale**2 + (1 - scale) ** 2) ** 0.5
        errors = found.diagnostics
        assert (abs(found.k - 0.2) < 4 * errors["k_se"] + 1e-6).all()
        assert (abs(found.bias - 0.05) < 4 * errors["bias_se"][:, None]).all()
        assert (abs(found.q - q) < 4 * errors["q_se"]).all()
    for name in ("k", "bias", "q"):
        assert np.allclose(getattr(for_guidance(fit, 3.0), name), getattr(fit, name), rtol=1e-5)


def test_one_fit_serves_other_samplers_and_numbers_of_steps():
    pipe = make_dit()
    quantized = disturbed(pipe.transformer, 0.2, 0.05)
    fit = fit_correction(pipe, quantized, fit_runs=[dit_run(3)], variant="both")
    for scheduler in (UniPCMultistepScheduler(), DDPMScheduler(clip_sample=False), HeunDiscreteScheduler()):
        other = make_dit(scheduler)
        exact = dit_run(5)(other)
        other.transformer = quantized
        none = mse(dit_run(5)(other), exact)
        assert mse(dit_run(5)(apply_correction(other, fit)), exact) < 1e-2 * none


def test_an_interrupted_fit_goes_on_where_it_was(tmp_path):
    pipe = make_dit()
    quantized, tests = disturbed(pipe.transformer, 0.2, 0.05), [dit_run(100), dit_run(200)]
    asked = []

    def fit(distance):
        return fit_correction(
            pipe, quantized, fit_runs=[dit_run(3)], test_runs=tests, distance=distance, resume=tmp_path / "fit.json"
        )

    def breaking(images, reference):
        asked.append(1)
        if len(asked) > 5:
            raise KeyboardInterrupt
        return mse(images, reference)

    with pytest.raises(KeyboardInterrupt):
        fit(breaking)
    before = len(asked) - 1
    asked.clear()
    resumed = fit(lambda images, reference: asked.append(1) or mse(images, reference))
    assert len(asked) == 2 * len(resumed.measured) - before // 2 * 2
    assert (
        resumed.measured
        == fit_correction(pipe, quantized, fit_runs=[dit_run(3)], test_runs=tests, distance=mse).measured
    )


def test_the_quantized_network_sees_the_full_precision_trajectory():
    pipe = make_dit()
    exact, seen = [], []
    collect_(NoiseStatistics(), pipe, dit_run(3), watched(disturbed(pipe.transformer, 0.0, 0.0), exact))
    collect_(NoiseStatistics(), pipe, dit_run(3), watched(disturbed(pipe.transformer, 0.5, 0.3), seen))
    assert len(exact) == len(seen) == STEPS
    assert all(torch.equal(a, b) for a, b in zip(exact, seen, strict=True))


def test_the_doubled_batch_of_dit_guidance_counts_once():
    dit, sd = make_dit(), make_sd()
    fits = [
        fit_correction(dit, disturbed(dit.transformer, 0.2, 0.0), fit_runs=[dit_run(3, num=4)], variant="k"),
        fit_correction(sd, disturbed(sd.unet, 0.2, 0.0), fit_runs=[sd_run(3, num=4)], variant="k"),
    ]
    assert fits[0].diagnostics["count"][0] == fits[1].diagnostics["count"][0] == 4 * 8 * 8


def test_a_correction_fitted_on_some_trajectories_repairs_others():
    pipe = make_dit()
    quantized = disturbed(pipe.transformer, 0.2, 0.05)
    tests = [dit_run(100 * i) for i in range(1, 5)]
    fit = fit_correction(pipe, quantized, fit_runs=[dit_run(3), dit_run(50)], test_runs=tests, distance=mse)
    assert fit.variant == "both"
    assert max(fit.measured["both"]) < 1e-3 * min(fit.measured["none"])
    exact = [run(pipe) for run in tests]
    pipe.transformer = quantized
    apply_correction(pipe, fit)
    assert [mse(run(pipe), e) for run, e in zip(tests, exact, strict=True)] == fit.measured["both"]


def test_another_number_of_steps_than_the_fit_had_is_repaired_too():
    pipe = make_dit()
    fit = fit_correction(pipe, disturbed(pipe.transformer, 0.2, 0.05), fit_runs=[dit_run(3)], variant="both")

    def longer(pipe):
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        return pipe([1, 2], 3.0, generators, num_inference_steps=7, output_type="pt").images

    exact = longer(pipe)
    pipe.transformer = disturbed(pipe.transformer, 0.2, 0.05)
    none = mse(longer(pipe), exact)
    assert mse(longer(apply_correction(pipe, fit)), exact) < 1e-3 * none


def test_noise_explained_from_another_network_is_only_what_differs_from_it():
    pipe = make_dit()
    weights = disturbed(pipe.transformer, 0.3, 0.0)  # weights quantized
    both = disturbed(weights, 0.2, 0.0)  # and activations
    fit = fit_correction(pipe, both, explained_from=weights, fit_runs=[dit_run(3)], variant="k")
    assert fit.k == pytest.approx([0.2] * STEPS, abs=1e-4)


def test_a_context_that_quantizes_in_place_serves_like_a_module():
    from contextlib import contextmanager

    pipe = make_dit()
    weight = pipe.transformer.proj_out_2.weight

    @contextmanager
    def scaled():
        exact = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.25)
        try:
            yield
        finally:
            with torch.no_grad():
                weight.copy_(exact)

    fit = fit_correction(pipe, scaled, fit_runs=[dit_run(3)], variant="k")
    assert fit.k == pytest.approx([0.25] * STEPS, abs=1e-3)


def test_runs_that_do_not_repeat_themselves_are_refused():
    pipe = make_dit()

    def unseeded(pipe):
        return pipe([1, 2], 3.0, num_inference_steps=STEPS, output_type="pt").images

    steps = iter((3, 2))

    def shrinking(pipe):
        generator = torch.Generator().manual_seed(1)
        return pipe([1], 3.0, generator, num_inference_steps=next(steps), output_type="pt").images

    counts = iter((3, 2))

    def stopping(pipe):
        pipe.scheduler.set_timesteps(STEPS)
        sample = torch.ones(1, 4, 8, 8)
        for t in pipe.scheduler.timesteps[: next(counts)]:
            sample = pipe.scheduler.step(sample, t, sample).prev_sample
        return sample

    quantized = disturbed(pipe.transformer, 0.1, 0.0)
    for run in (unseeded, shrinking, stopping):
        with pytest.raises(QuantDMError, match="repeats itself"):
            fit_correction(pipe, quantized, fit_runs=[run], variant="k")
    with pytest.raises(QuantDMError, match="no scheduler step"):
        fit_correction(pipe, quantized, fit_runs=[lambda pipe: torch.zeros(1)], variant="k")
    with pytest.raises(QuantDMError, match="at least 2 test_runs"):
        fit_correction(pipe, quantized, fit_runs=[dit_run(1)])
    assert isinstance(pipe.transformer, DiTTransformer2DModel)


# ---------------------------------------------------------------------------------------------- choosing by outcome


def flat_correction(k=0.1):
    rows = np.ones(2)
    return Correction(np.arange(2.0), k * rows, rows[:, None], rows[:, None], rows)


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ({"k": 0.5, "both": 0.5, "both+variance": 0.5}, "k"),
        ({"bias": 0.2, "k": 0.5, "both": 0.7, "both+variance": 0.7}, "both"),
        ({"both+variance": 0.6}, "both+variance"),
        ({"k": -0.5, "both": -0.4}, "none"),
        ({"k": 0.001, "both": 0.002, "bias": 0.001}, "none"),
        ({}, "none"),
    ],
    ids=["simplest of equals", "each adds", "only all together", "harmful", "within noise", "no effect"],
)
def test_the_simplest_variant_that_lowers_the_distance_beyond_noise_is_kept(gains, expected):
    noise = np.random.default_rng(0).normal(0, 0.02, (6, 5))
    order = ["none", "bias", "k", "both", "both+variance"]

    def measure(correction):
        name = "none" if correction is None else correction.variant
        return list(2.0 - gains.get(name, 0.0) + noise[:, order.index(name)])

    chosen = choose_variant(measure, flat_correction())
    assert chosen.variant == expected
    assert list(chosen.measured)[:5] == order
    assert chosen.within is None
    assert chosen.choice == expected


def test_a_variant_that_helps_at_fine_levels_only_is_kept_there():
    noise = np.random.default_rng(0).normal(0, 0.01, (6, 3))

    def measure(correction):
        if correction is None:
            return list(2.0 + noise[:, 0])
        gain = {None: 0.3, False: -0.2, True: 0.5}[correction.within and correction.within[0] > -10]
        return list(2.0 - gain * (correction.variant == "bias") + noise[:, 1])

    chosen = choose_variant(measure, flat_correction())
    assert chosen.choice == "bias, finer half"
    assert chosen.at(0.0).is_nothing
    assert not chosen.at(1.0).is_nothing


def test_a_variant_that_is_not_better_on_each_of_the_first_runs_is_not_measured_on_the_others():
    without = [1.0, 1.2, 1.1, 0.9]
    assert glanced(iter([1.1, 1.2, 0.1, 0.1]), without) == [1.1, 1.2]
    assert glanced(iter([1.1, 0.5, 0.1, 0.1]), without) == [1.1, 0.5]
    assert glanced(iter([0.9, 1.1, 2.0, 0.1]), without) == [0.9, 1.1, 2.0, 0.1]
    chosen = choose_variant(lambda c: without if c is None else [1.1, 1.2], flat_correction())
    assert chosen.variant == "none"
    assert chosen.measured["bias"] == [1.1, 1.2]


def test_rivals_are_tried_like_the_own_variants():
    pipe = make_dit()
    quantized = disturbed(pipe.transformer, 0.2, 0.0)
    fit = fit_correction(
        pipe, quantized, fit_runs=[dit_run(3)], test_runs=[dit_run(9), dit_run(19)], distance=mse,
        variants=("none", *RIVALS),
    )  # fmt: skip
    assert {*RIVALS} <= {*fit.measured}
    assert max(fit.measured["ptqd"]) < 1e-2 * min(fit.measured["none"])
    assert fit.measured["qdrift"] != fit.measured["none"]


def test_without_a_significant_slope_the_variants_of_the_slope_are_not_tried():
    chosen = choose_variant(lambda correction: [1.0, 1.0], flat_correction(k=0.0))
    assert list(chosen.measured) == ["none", "bias", "both+variance"]
    assert chosen.variant == "none"


def test_distances_that_cannot_be_judged_are_refused():
    for distances in ([1.0], [1.0, float("nan")]):
        with pytest.raises(QuantDMError, match="finite"):
            choose_variant(lambda correction, d=distances: d, flat_correction())


# ----------------------------------------------------------------------------------------- pipelines that are corrected


def fitted(pipe):
    return fit_correction(
        pipe, disturbed(pipe.transformer, 0.2, 0.05, 0.1), fit_runs=[dit_run(3)], variant="both+variance"
    )


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
def test_a_correction_is_put_on_exchanged_and_taken_off(scheduler):
    pipe = make_dit(scheduler(clip_sample=False, beta_end=0.015, timestep_spacing="trailing"))
    fit, plain, images = fitted(pipe), pipe.scheduler, dit_run(5)(pipe)
    assert apply_correction(pipe, fit) is pipe
    assert isinstance(pipe.scheduler, scheduler)
    assert isinstance(pipe.scheduler, CorrectedScheduler)
    assert mse(dit_run(5)(pipe), images) > 0
    apply_correction(pipe, fit.with_variant("none"))
    assert torch.equal(dit_run(5)(pipe), images)
    remove_correction(pipe)
    assert type(pipe.scheduler) is scheduler
    assert dict(pipe.scheduler.config) == dict(plain.config)
    assert torch.equal(dit_run(5)(pipe), images)
    assert remove_correction(pipe) is pipe


def test_a_default_eta_reaches_a_pipeline_that_passes_none():
    pipe = make_dit()
    deterministic = dit_run(5)(pipe)
    apply_correction(pipe, None, eta=1.0)
    stochastic = dit_run(5)(pipe)
    assert mse(stochastic, deterministic) > 0
    apply_correction(pipe, fitted(make_dit()).with_variant("none"))
    assert torch.equal(dit_run(5)(pipe), stochastic)  # it stays when only the correction changes


def test_a_corrected_pipeline_saves_and_loads_in_a_new_process(tmp_path):
    pipe = make_dit()
    apply_correction(pipe, fitted(pipe), eta=0.5)
    torch.save(dit_run(5)(pipe), tmp_path / "images.pt")
    pipe.save_pretrained(tmp_path / "export")
    script = f"""
import torch, quantdm
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained({str(tmp_path / "export")!r})
torch.manual_seed(5)
images = pipe([0, 1, 2, 3], 3.0, [torch.Generator().manual_seed(5 + i) for i in range(4)],
              num_inference_steps={STEPS}, output_type="pt").images
assert type(pipe.scheduler).__qualname__ == "CorrectedDDIMScheduler"
print((images - torch.load({str(tmp_path / "images.pt")!r})).abs().max().item())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == 0.0


PLAIN_SCRIPT = """
import sys, torch
from diffusers import DDIMScheduler, DiffusionPipeline
torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained(sys.argv[1] + "/export")
assert type(pipe.scheduler) is DDIMScheduler
assert "quantdm" not in sys.modules
torch.manual_seed(5)
images = pipe([0, 1, 2, 3], 3.0, [torch.Generator().manual_seed(5 + i) for i in range(4)],
              num_inference_steps=int(sys.argv[2]), output_type="pt").images
assert torch.equal(images, torch.load(sys.argv[1] + "/images.pt"))
"""


def test_plain_diffusers_opens_a_corrected_pipeline_uncorrected(tmp_path):
    pipe = make_dit(DDIMScheduler(clip_sample=False, beta_end=0.015))
    images = dit_run(5)(pipe)
    apply_correction(pipe, fitted(pipe))
    pipe.save_pretrained(tmp_path / "export")
    torch.save(images, tmp_path / "images.pt")
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_SCRIPT, str(tmp_path), str(STEPS)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "unexpected" not in done.stderr + done.stdout
    # and the correction survives the plain class
    again = DiffusionPipeline.from_pretrained(tmp_path / "export")
    assert isinstance(again.scheduler, CorrectedScheduler)
    assert again.scheduler.correction is not None
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "export", subfolder="scheduler")
    assert corrected_class(DDIMScheduler).from_config(scheduler.config).correction is not None


def test_what_does_not_fit_is_refused_with_what_does():
    pipe = make_dit()
    fit = fitted(pipe)
    with pytest.raises(QuantDMError, match="fitted on another denoiser"):
        apply_correction(make_sd(), fit)
    pipe.scheduler = FLOW
    with pytest.raises(QuantDMError, match=r"fitted on epsilon predictions, the scheduler has flow_prediction.*family"):
        apply_correction(pipe, fit)
    pipe.scheduler = AmusedScheduler(mask_token_id=1)
    with pytest.raises(QuantDMError, match="got scheduler AmusedScheduler, expected one of CMStochastic"):
        fit_correction(pipe, pipe.transformer, fit_runs=[dit_run(3)], variant="k")
    pipe.scheduler = DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(QuantDMError, match="fitted on epsilon predictions"):
        apply_correction(pipe, fit)
    pipe.scheduler = DDPMScheduler(variance_type="fixed_large_log")
    with pytest.raises(QuantDMError, match="fixed_large_log"):
        apply_correction(pipe, fit)
    with pytest.raises(QuantDMError, match=r"eta 0\.5"):
        apply_correction(pipe, fit.with_variant("both"), eta=0.5)
