"""Every kind of pipeline makes what its protocol asks for, image by image the same, in whatever batches it comes."""

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from PIL import Image
from typer.testing import CliRunner

from quantdm import Protocol, evaluate, generate, load_protocol
from quantdm.cli.main import app
from quantdm.metrics.distance import psnr, psnr_of_bytes
from quantdm.metrics.features import load_extractor
from quantdm.metrics.pyramid import pyramid_features
from quantdm.metrics.samples import Draw, Samples, compare, compare_real, draw_samples, real_floor
from quantdm.pipelines.drawn import CLIP_FRAMES, KINDS, draw
from quantdm.pipelines.generate import count_calls
from quantdm.pipelines.subject import look_at
from quantdm.runs.evaluator import NOISE_CALLS, Evaluator, Probe
from quantdm.runs.run import Run
from quantdm.runs.settings import Effort, make_settings
from quantdm.runs.stages import build_bank
from quantdm.schemes import Scheme
from tests.pipeline_kinds import KINDS as PIPELINES
from tests.pipeline_kinds import make, unet

SEEDS = range(5, 9)


@pytest.mark.parametrize("kind", PIPELINES)
def test_an_image_depends_on_its_seed_and_its_arguments_and_not_on_its_batch(kind):
    pipe, protocol = make(kind)
    together = generate(pipe, protocol, SEEDS)
    pairs = generate(pipe, protocol, SEEDS, batch_size=2)
    apart = torch.cat([generate(pipe, protocol, [5 + i], first=i) for i in range(4)])
    assert len(together) == 4
    assert 0 <= together.min() < together.max() <= 1
    torch.testing.assert_close(together, apart, atol=2e-5, rtol=0)
    torch.testing.assert_close(together, pairs, atol=2e-5, rtol=0)
    assert not torch.allclose(together[0], generate(pipe, protocol, [99])[0], atol=1e-3)  # another seed
    if protocol.arguments:
        moved = generate(pipe, protocol, [5], first=1)  # the same seed, the next image's arguments
        assert not torch.allclose(together[0], moved[0], atol=1e-4)


@pytest.mark.parametrize("kind", PIPELINES)
def test_every_kind_is_measured_against_itself(kind):
    pipe, protocol = make(kind)
    samples = draw_samples(pipe, protocol, pyramid_features, Draw(1, 3, protocol.steps))
    assert samples.images.dtype == torch.uint8
    assert len(samples.images) == len(samples.features) == len(samples.flagged) == 3 * samples.frames
    assert samples.frames == (3 if kind == "video" else 1)
    figures = compare(samples, samples)
    assert figures["fid_fp"] < 1e-9
    assert figures["psnr_fp"] is None


def test_videos_are_compared_frame_by_frame_and_kept_on_disk(tmp_path):
    pipe, protocol = make("video")
    videos = generate(pipe, protocol, [10**6, 10**6 + 1])
    assert videos.shape == (2, 3, 3, 32, 32)
    samples = draw_samples(pipe, protocol, pyramid_features, Draw(1, 2, protocol.steps))
    assert torch.equal(samples.images, (videos.flatten(0, 1) * 255).round().to(torch.uint8))
    samples.save(tmp_path / "s.safetensors")
    assert Samples.load(tmp_path / "s.safetensors").frames == 3
    digits = protocol.model_copy(update={"real": "digits", "features": "digits"})
    measured = Samples(samples.images, load_extractor("digits")(samples.images / 255), 0.0, samples.flagged, frames=3)
    assert 0 <= compare_real(measured, digits)["agreement"] <= 1


def test_latents_are_a_result_too():
    pipe, said = make("text-to-image")
    protocol = said.model_copy(update={"output": "latent"})
    latents = generate(pipe, protocol, SEEDS)
    assert latents.shape == (4, 4, 8, 8)
    pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.detach() / 2 + 0.5
    torch.testing.assert_close(pixels.clamp(0, 1), generate(pipe, said, SEEDS), atol=2e-4, rtol=0)
    result = evaluate(pipe, protocol=protocol, reference=pipe, num_images=4, seeds=[1])
    assert result["mean"]["fid_fp"] < 1e-9


def test_a_batch_ends_where_an_argument_of_the_whole_call_changes():
    pipe = DDIMPipeline(unet(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    said = {"version": 2, "steps": 2, "features": "pyramid"}
    protocol = Protocol(**said, call={"eta": [0.0, 0.0, 0.9]})
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    made = generate(pipe, protocol, range(6))
    assert sizes == [2, 2, 1, 1, 2, 2, 1, 1]  # two steps each
    assert count_calls(pipe, protocol, 6) == 4
    for eta, where in ((0.0, [0, 1, 3, 4]), (0.9, [2, 5])):
        alone = generate(pipe, Protocol(**said, call={"eta": eta}), where)
        torch.testing.assert_close(made[where], alone, atol=2e-5, rtol=0)


def test_images_become_bytes_and_features_batch_by_batch(dit):
    protocol, seen = load_protocol("digits-dit"), []
    digits = load_extractor("digits")

    def extract(images):
        seen.append(len(images))
        return digits(images)

    samples = draw_samples(dit, protocol, extract, Draw(1, 5, 2), batch_size=2)
    assert seen == [2, 2, 1]
    whole = draw_samples(dit, protocol, digits, Draw(1, 5, 2))
    assert (samples.images.int() - whole.images.int()).abs().max() <= 1
    torch.testing.assert_close(samples.features, whole.features, atol=0.05, rtol=0.01)


def test_the_psnr_of_bytes_is_that_of_pixels():
    a, b = torch.randint(0, 256, (2, 5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert psnr_of_bytes(a, b) == pytest.approx(psnr(a / 255, b / 255), rel=1e-6)
    assert psnr_of_bytes(a, a) == float("inf")


def test_real_images_come_from_a_folder(tmp_path):
    pipe, said = make("text-to-image")
    for number in range(6):
        draw("scene", number, (40, 30)).save(tmp_path / f"{number}.png")
    protocol = said.model_copy(update={"real": str(tmp_path)})
    result = evaluate(pipe, protocol=protocol, num_images=4, seeds=[1])
    assert result["mean"]["fid_real"] > 0
    assert "agreement" not in result["mean"]
    assert real_floor(protocol) > 0
    scenes = torch.stack([torch.from_numpy(np.array(draw("scene", i, (40, 30)))).permute(2, 0, 1) for i in range(6)])
    same = Samples(scenes, pyramid_features(scenes / 255), 0.0, torch.zeros(6, dtype=torch.bool))
    assert compare_real(same, protocol)["fid_real"] < 1e-6


def test_sensitivities_see_every_image_where_calls_make_one(tmp_path):
    pipe, protocol = make("image-to-image")
    subject, options = look_at(pipe), [Scheme.parse("uniform-channel-2"), Scheme.parse("uniform-channel-8")]
    settings = make_settings(
        subject, target_bits=4.0, target_bytes=None, trials=30, seed=0, options=options, protocol=protocol,
        effort=Effort(2, 3, 2, 3),
    )  # fmt: skip
    run = Run.create(tmp_path / "run", settings)
    build_bank(run, subject)
    evaluator = Evaluator(run, subject)
    rough, fine = evaluator.sensitivity(Probe("conv_in", settings.options))
    assert rough > 10 * fine > 0
    calls = evaluator.recorded_calls()["unet"]
    assert len(calls) % 3 == 0
    assert 3 <= len(calls) <= 3 * NOISE_CALLS
    assert len({float(call.args[0].sum()) for call in calls}) == len(calls)


def test_the_command_line_lays_a_video_out_as_a_row_of_frames(tmp_path):
    pipe, protocol = make("video")
    pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "p.yaml").write_text(protocol.model_dump_json())
    arguments = ["generate", str(tmp_path / "pipe"), "-o", str(tmp_path / "v.png"), "--images", "2"]
    done = CliRunner().invoke(app, [*arguments, "--protocol", str(tmp_path / "p.yaml")], catch_exceptions=False)
    assert done.exit_code == 0
    with Image.open(tmp_path / "v.png") as grid:
        assert grid.size == (3 * 32, 2 * 32)


# ------------------------------------------------------------------------------------------------------- drawn and seen


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_pictures_follow_from_their_number_alone(kind):
    first, again, other = draw(kind, 3, (48, 32)), draw(kind, 3, (48, 32)), draw(kind, 4, (48, 32))
    frames = [np.array(picture) for picture in (first if isinstance(first, list) else [first])]
    assert len(frames) == (CLIP_FRAMES if kind == "clip" else 1)
    assert frames[0].shape == (32, 48, 3)
    assert np.array_equal(frames[0], np.array(again[0] if isinstance(again, list) else again))
    assert not np.array_equal(frames[0], np.array(other[0] if isinstance(other, list) else other))
    assert frames[0].std() > 5
    if kind == "clip":
        assert not np.array_equal(frames[0], frames[-1])


SHAPES = [(4, 3, 32, 32), (4, 1, 8, 8), (4, 3, 4, 4), (4, 16, 8, 8), (4, 64, 32), (4, 4, 3, 8, 8)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_pyramid_sees_blur_noise_and_shifted_colours(shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    found = pyramid_features(x)
    assert found.shape[0] == 4
    assert found.isfinite().all()
    for changed in (x * 0.8, x + 0.1, 0.5 * (x + x.roll(1, -1))):
        assert (pyramid_features(changed) - found).abs().max() > 0.01
