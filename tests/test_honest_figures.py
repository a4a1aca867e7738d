"""Figures are of what they say they are of: NaN is an error, blank images are counted, spreads and digits are real."""

import json

import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor
from typer.testing import CliRunner

from quantdm import QuantDMError, evaluate, generate, get_denoiser, load_pipeline, load_protocol
from quantdm.cli.main import app
from quantdm.metrics import frechet_distance, load_extractor, psnr, relative_error
from quantdm.metrics.samples import Draw, Samples, compare, compare_real, draw_samples
from quantdm.metrics.statistics import mean_and_sd, spread, totals
from quantdm.pipelines.embedded.digits import WORDS, digit_of, load_digit_images
from quantdm.pipelines.subject import look_at
from quantdm.runs.evaluator import Evaluator, Job, Probe, configured
from quantdm.runs.run import Run
from quantdm.schemes import Scheme

DIT = load_protocol("digits-dit")
EXTRACT = load_extractor("digits")


def of_images(images, flagged=None):
    """Samples of given uint8 images."""
    flags = torch.zeros(len(images), dtype=torch.bool) if flagged is None else torch.tensor(flagged)
    return Samples(images, EXTRACT(images.float() / 255), 1.0, flags)


@pytest.fixture
def broken_vae():
    """digits-dit whose VAE overflows: its pixels are NaN for every latent."""
    pipe = load_pipeline("digits-dit")
    with torch.no_grad():
        next(pipe.vae.decoder.parameters()).fill_(float("nan"))
    return pipe


@pytest.fixture
def checked():
    """digits-sd with a real, tiny safety checker; `eager(True)` makes it flag everything, `eager(False)` nothing."""
    pipe = load_pipeline("digits-sd")
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8)).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pipe.register_modules(safety_checker=checker, feature_extractor=processor)

    def eager(flags):
        torch.nn.init.ones_(checker.concept_embeds)
        torch.nn.init.ones_(checker.special_care_embeds)
        torch.nn.init.constant_(checker.concept_embeds_weights, -2.0 if flags else 2.0)
        torch.nn.init.constant_(checker.special_care_embeds_weights, 2.0)
        return pipe

    return eager


# ---------------------------------------------------------------------------------------------------- NaN is an error


def test_nan_pixels_are_an_error_that_names_the_seed_and_not_black_images(broken_vae):
    with pytest.raises(QuantDMError, match=r"NaN or infinite pixels in 2 of 2, first with seed 7;.*float32") as caught:
        generate(broken_vae, DIT, [7, 8], steps=2)
    assert len(str(caught.value).splitlines()) == 1


def test_nan_on_both_sides_is_no_distance_of_zero(broken_vae, dit):
    with pytest.raises(QuantDMError, match=r"draw 3 \(4 images, 2 steps\) of the pipeline: images: NaN"):
        evaluate(broken_vae, protocol=DIT, reference=broken_vae, num_images=4, seeds=(3,), steps=2)
    with pytest.raises(QuantDMError, match=r"draw 3 \(4 images, 2 steps\) of the reference: images: NaN"):
        evaluate(dit, protocol=DIT, reference=broken_vae, num_images=4, seeds=(3,), steps=2)


def test_nan_of_a_configuration_names_the_configuration(finished, broken_vae):
    folder, recipe = finished
    evaluator = Evaluator(Run.open(folder), look_at(broken_vae))
    with pytest.raises(QuantDMError, match=r"draw 5 .* of a mix of .* over \d+ layers .*: images: NaN"):
        evaluator.samples(Job(Draw(5, 2, 2), recipe.layers))
    with pytest.raises(QuantDMError, match=r"draw 5 .* of full precision: images: NaN"):
        evaluator.reference(Draw(5, 2, 2))


def test_a_nan_layer_is_an_error_in_the_sensitivities(finished, dit):
    folder, _ = finished
    evaluator = Evaluator(Run.open(folder), look_at(dit))
    name, scheme = list(evaluator.bank.layers)[3], evaluator.run.settings.schemes[0]
    dense = evaluator.bank.dense(name, scheme, torch.float32)
    kept = dense.clone()
    dense.fill_(float("nan"))
    with pytest.raises(QuantDMError, match=rf"sensitivity of {name} under {scheme}: relative error: got nan"):
        evaluator.sensitivity(Probe(name, (scheme.label,)))
    dense.copy_(kept)


def test_nan_features_and_figures_are_errors():
    good = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    bad = good.clone()
    bad[2, 1] = float("inf")
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(QuantDMError, match="NaN or infinite for 1 of 9 images, first image 2"):
            frechet_distance(*pair)
    with pytest.raises(QuantDMError, match="got 1 images, expected at least 2"):
        frechet_distance(good[:1], good)
    for figure in (psnr, relative_error):
        with pytest.raises(QuantDMError, match="expected a number"):
            figure(bad, good)
    with pytest.raises(QuantDMError, match="relative error: got inf"):
        relative_error(good, 0 * good)
    assert relative_error(0 * good, 0 * good) == 0


def test_features_that_are_nan_are_an_error_of_the_draw(dit):
    def extract(images):
        return EXTRACT(images) / torch.zeros(())

    with pytest.raises(QuantDMError, match=r"draw 1 \(3 images, 2 steps\) of the pipeline: features: NaN or infinite"):
        draw_samples(dit, DIT, extract, Draw(1, 3, 2))


# ------------------------------------------------------------------------------------------ blank images are counted


def test_images_that_a_safety_checker_blanks_are_counted_on_either_side(checked, sd):
    protocol = load_protocol("digits-sd")
    sound = draw_samples(checked(False), protocol, EXTRACT, Draw(1, 4, 2))
    assert sound.flagged.tolist() == [False] * 4
    with pytest.raises(QuantDMError, match=r"pipeline: images: the safety checker flagged 4 of 4 and 0 have one"):
        draw_samples(checked(True), protocol, EXTRACT, Draw(1, 4, 2))
    black = sound.images.clone()
    black[:3] = 0
    flagged = of_images(black, [True, True, False, False])
    assert flagged.constant.tolist() == [False, False, True, False]
    for one, other in ((flagged, sound), (sound, flagged), (flagged, flagged)):
        figures = compare(one, other)
        assert (figures["flagged"], figures["constant"]) == (2, 1)
    assert (compare(sound, sound)["flagged"], compare(sound, sound)["constant"]) == (0, 0)


def test_evaluate_reports_what_the_safety_checker_flagged(checked, sd):
    pipe, protocol = checked(False), load_protocol("digits-sd")
    checker, seen = pipe.safety_checker.forward, []

    def first_of_a_batch(clip_input, images):  # the real checker, which flags the first image only
        images, flags = checker(clip_input, images)
        seen.append(len(flags))
        images[0] = 0 * images[0]
        return images, [True, *flags[1:]]

    pipe.safety_checker.forward = first_of_a_batch
    result = evaluate(pipe, protocol=protocol, reference=sd, num_images=3, seeds=(1, 2), steps=2)
    assert seen == [3, 3]
    assert (result["flagged"], result["constant"]) == (2, 0)
    assert [row["flagged"] for row in result["rows"]] == [1, 1]
    assert "flagged" not in result["mean"]
    json.dumps(result, allow_nan=False)


def test_a_pipeline_of_one_colour_is_an_error_but_a_configuration_of_one_is_a_bad_result():
    images = (255 * load_digit_images("test")[0][:20]).to(torch.uint8)
    grey = torch.full_like(images, 128)
    grey[:, 2] = 90  # one colour, not only one brightness
    assert of_images(grey).constant.all()
    assert not of_images(images).constant.any()
    figures = compare(of_images(grey), of_images(images))
    assert figures["constant"] == 20
    assert figures["fid_fp"] > 1


def test_a_pipeline_whose_images_are_all_black_is_an_error(dit):
    pipe = load_pipeline("digits-dit")
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.zero_()
        pipe.vae.decoder.conv_out.bias.fill_(-9)
    with pytest.raises(QuantDMError, match=r"flagged 0 of 3 and 3 have one colour only"):
        evaluate(pipe, protocol=DIT, reference=pipe, num_images=3, seeds=(1,), steps=2)
    measured = draw_samples(pipe, DIT, EXTRACT, Draw(1, 3, 2), may_be_constant=True)
    assert compare(measured, draw_samples(dit, DIT, EXTRACT, Draw(1, 3, 2)))["constant"] == 3


def test_flags_are_kept_on_disk_and_a_file_without_them_is_refused(tmp_path):
    from quantdm.files import save_tensors

    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    samples = of_images(images, [False, True, False])
    samples.save(tmp_path / "a.safetensors")
    assert Samples.load(tmp_path / "a.safetensors").flagged.tolist() == [False, True, False]
    save_tensors(tmp_path / "b.safetensors", {"images": images, "features": samples.features}, {"seconds": 1.0})
    with pytest.raises(QuantDMError, match="does not say which images were flagged"):
        Samples.load(tmp_path / "b.safetensors")


# ----------------------------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize(
    ("value", "digit"),
    [
        (7, 7), (0, 0), (10, None), (207, None), ("a handwritten seven", 7), ("Seven!", 7), ("the digit 3", 3),
        ("seventeen", None), ("a 12", None), ("one or two", None), ("a 7, seven", 7), ("a cat", None), ("", None),
    ],
)  # fmt: skip
def test_the_digit_that_a_condition_asks_for(value, digit):
    assert digit_of(value) == digit


@pytest.mark.parametrize("name", ["digits-dit", "digits-flow", "digits-sd"])
def test_every_value_of_the_shipped_protocols_names_its_digit(name):
    assert [digit_of(value) for value in load_protocol(name).values] == list(range(len(WORDS)))


def test_agreement_is_with_the_value_and_not_with_its_position():
    images, labels = load_digit_images("test")
    by_digit = [images[labels == digit] for digit in range(10)]
    shown = torch.stack([by_digit[digit][i] for i, digit in enumerate([7, 7, 3] * 4)])
    samples = of_images((255 * shown).round().to(torch.uint8))
    for values in ((7, 7, 3), ("a handwritten seven", "7", "three")):
        protocol = DIT.model_copy(update={"values": values})
        assert compare_real(samples, protocol)["agreement"] > 0.9
    wrong = DIT.model_copy(update={"values": (3, 3, 7)})
    assert compare_real(samples, wrong)["agreement"] < 0.1
    for values in (("a cat", "a dog"), ("a seven", "a dog"), (7, 207)):
        figures = compare_real(samples, DIT.model_copy(update={"values": values}))
        assert "agreement" not in figures
        assert "fid_real" in figures


# -------------------------------------------------------------------------------------------------------------- spread


def test_one_draw_has_no_standard_deviation(dit):
    assert mean_and_sd([{"a": 1.0}])["sd"] == {"a": None}
    assert mean_and_sd([{"a": 1.0}, {"a": 3.0}])["sd"]["a"] == pytest.approx(2**0.5)
    assert totals([{"a": 1.0, "flagged": 1, "constant": 0}, {"a": 1.0, "flagged": 2, "constant": 4}]) == {
        "flagged": 3, "constant": 4
    }  # fmt: skip
    assert spread(0.5, None) == "0.5000"
    assert spread(0.5, 0.25, 2) == "0.50 ± 0.25"
    assert spread(3.31e-6, 2.2e-7) == "3.3e-06 ± 2e-07"  # no perfect score
    assert spread(1e-12, 2e-12) == "0.0000 ± 0.0000"  # rounding of a distance that is none
    result = evaluate(dit, protocol=DIT, num_images=3, seeds=(4,), steps=2)
    assert set(result["sd"].values()) == {None}
    assert None not in result["mean"].values()
    with pytest.raises(QuantDMError, match=r"seeds: got \[\]"):
        evaluate(dit, protocol=DIT, seeds=())


def test_the_command_line_prints_one_draw_without_a_spread_and_the_counts():
    arguments = ["evaluate", "digits-dit", "--images", "3", "--seeds", "1", "--steps", "2"]
    out = CliRunner().invoke(app, arguments, catch_exceptions=False).output
    assert "fid_real" in out
    assert "±" not in out
    assert "digits-dit: 3 images, 2 steps, on 1 draw of noises (seeds 1)" in out
    assert "fewer than 2,048 images: compare Frechet distances of equally many only" in out
    assert "safety checker" not in out  # it flagged nothing
    assert max(map(len, out.splitlines())) <= 79


# ------------------------------------------------------------------------------------------------------ configurations


def test_a_configuration_that_leaves_layers_out_is_not_measured(finished, dit):
    folder, recipe = finished
    evaluator = Evaluator(Run.open(folder), look_at(dit))
    weight = get_denoiser(dit).get_parameter(f"{next(iter(recipe.layers))}.weight").data_ptr()
    for labels in ({}, dict(list(recipe.layers.items())[:-1]), {**recipe.layers, "nowhere": "kmeans-channel-4"}):
        job = Job(Draw(1, 2, 2), labels)
        with pytest.raises(QuantDMError, match=r"no scheme for \d+ layers?|layers? that the model has not"):
            evaluator.samples(job)
        with pytest.raises(QuantDMError, match="configuration is for another model"):
            configured(dit, evaluator.bank, job, evaluator.tables).__enter__()
    assert get_denoiser(dit).get_parameter(f"{next(iter(recipe.layers))}.weight").data_ptr() == weight
    everywhere = dict.fromkeys(recipe.layers, Scheme.parse("kmeans-channel-4").label)
    assert Job(Draw(1, 2, 2), everywhere).description.startswith("kmeans-channel-4 everywhere over")
