"""What makes no images or videos is refused at the door; images of one channel, and one image alone, are fine."""

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, StableDiffusionInpaintPipeline
from PIL import Image

from quantdm import CalibrationSpec, QuantDMError, Recipe, generate, load_protocol, search
from quantdm.cli.images import generate_grid, protocol_of
from quantdm.corridor.run import run
from quantdm.metrics.evaluate import evaluate
from quantdm.metrics.sampled import first_made
from quantdm.pipelines.generate import check_generates
from quantdm.pipelines.protocol import Protocol
from quantdm.runs.settings import Effort

PROMPT = Protocol(argument="prompt", values=("a",), steps=1, guidance_scale=2.0, features="digits")
REFUSED = {
    "makes audios": ("StableAudioPipeline", "AudioLDM2Pipeline", "MusicLDMPipeline"),
    "needs a picture": (
        "StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline", "FluxInpaintPipeline", "FluxFillPipeline",
        "StableDiffusion3InpaintPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionUpscalePipeline",
        "StableDiffusionControlNetPipeline", "StableDiffusionInstructPix2PixPipeline", "FluxImg2ImgPipeline",
        "VideoToVideoSDPipeline",
    ),
    "it takes no condition at all": ("DDPMPipeline", "DDIMPipeline"),
    "argument is image": ("StableVideoDiffusionPipeline",),
    "makes image_embeds": ("KandinskyPriorPipeline",),
    "needs image_embeddings": ("StableCascadeDecoderPipeline",),
    "takes no guidance_scale": ("HunyuanImagePipeline", "HunyuanVideo15Pipeline"),
}  # fmt: skip
TAKEN = (
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "Flux2Pipeline",
    "FluxKontextPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline", "HunyuanDiTPipeline", "SanaPipeline",
    "QwenImagePipeline", "Lumina2Pipeline", "ZImagePipeline", "Kandinsky3Pipeline", "IFPipeline", "CogView4Pipeline",
    "AnimateDiffPipeline", "WanPipeline", "CogVideoXPipeline", "LTXPipeline", "MochiPipeline", "LattePipeline",
    "SanaVideoPipeline", "TextToVideoSDPipeline",
)  # fmt: skip


def test_an_export_of_an_own_model_brings_the_protocol_of_its_search(tmp_path):
    own = load_protocol("digits-dit").model_copy(update={"steps": 7})
    recipe = Recipe(
        model="mine", default="kmeans-channel-3-feedback",
        calibration=CalibrationSpec(protocol=own.model_dump(mode="json")),
    )  # fmt: skip
    recipe.save(tmp_path / "recipe.yaml")
    assert protocol_of(str(tmp_path), None, None) == own
    assert protocol_of(str(tmp_path), None, "digits-sd") == load_protocol("digits-sd")  # what is named comes first
    recipe.model_copy(update={"calibration": None, "default": "kmeans-channel-3"}).save(tmp_path / "recipe.yaml")
    with pytest.raises(QuantDMError, match="no protocol for model 'mine'"):
        protocol_of(str(tmp_path), None, None)


def bare(name):
    """A pipeline of a class without its parts: the door looks at the class only."""
    return object.__new__(getattr(diffusers, name))


@pytest.mark.parametrize(("expected", "name"), [(kind, name) for kind, names in REFUSED.items() for name in names])
def test_a_pipeline_that_makes_no_images_from_this_protocol_is_refused(expected, name):
    with pytest.raises(QuantDMError, match=expected) as error:
        check_generates(bare(name), PROMPT)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", TAKEN)
def test_text_to_image_and_text_to_video_pipelines_are_taken(name):
    check_generates(bare(name), PROMPT)


def test_a_video_pipeline_says_how_many_frames_it_is_asked_for():
    fewer = Protocol(**{**PROMPT.model_dump(), "version": 2, "call": {"num_frames": 9}})
    assert first_made(bare("LTXPipeline"), PROMPT) == (
        "the first video, 161 frames (num_frames in the protocol's `call` asks for fewer)"
    )
    assert first_made(bare("LTXPipeline"), fewer) == "the first video, 9 frames"
    assert first_made(bare("StableDiffusionPipeline"), PROMPT) == "the first image"


@pytest.mark.parametrize("asked", [{"features": "incption"}, {"metrics": ("clp_score",)}])
def test_unknown_features_are_refused_before_a_pipeline_is_opened(asked, tmp_path):
    protocol = PROMPT.model_copy(update=asked)
    for call in (search, run):
        with pytest.raises(QuantDMError, match=r"incption|clp_score"):
            call(tmp_path / "no pipeline here", target_bits=3.0, run_dir=tmp_path / "run", protocol=protocol)


def test_an_inpainting_pipeline_is_refused_by_every_stage_before_it_runs(sd, tmp_path):
    pipe = StableDiffusionInpaintPipeline(**sd.components, requires_safety_checker=False)
    protocol = load_protocol("digits-sd")
    called = []
    handle = pipe.unet.register_forward_pre_hook(lambda *_: called.append(1))
    for stage in (
        lambda: generate(pipe, protocol, [0], steps=1),
        lambda: evaluate(pipe, protocol=protocol, num_images=2, seeds=[1], steps=1),
        lambda: evaluate(sd, protocol=protocol, reference=pipe, num_images=2, seeds=[1], steps=1),
        lambda: search(pipe, target_bits=3.0, run_dir=tmp_path / "run", protocol=protocol),
    ):
        with pytest.raises(QuantDMError, match="needs a picture"):
            stage()
    handle.remove()
    assert not called
    assert not list(tmp_path.iterdir())
    pipe.save_pretrained(tmp_path / "inpaint")
    with pytest.raises(QuantDMError, match="needs a picture"):
        generate_grid(
            str(tmp_path / "inpaint"), tmp_path / "a.png", images=1, seed=0, steps=1, protocol="digits-sd", columns=1
        )
    assert [path.name for path in tmp_path.iterdir()] == ["inpaint"]


def tiny_pipeline(channels):
    """A DiT pipeline whose images have that many channels."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=2,
    )  # fmt: skip
    vae = AutoencoderKL(
        in_channels=channels, out_channels=channels, block_out_channels=(8, 8, 8), latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=4,
    )  # fmt: skip
    pipe = DiTPipeline(transformer, vae, DDIMScheduler(), id2label={i: str(i) for i in range(10)})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_grey_and_single_images_are_generated_and_measured(channels, mode, images, tmp_path):
    pipe, protocol = tiny_pipeline(channels), load_protocol("digits-dit")
    assert generate(pipe, protocol, range(images), steps=1).shape == (images, channels, 32, 32)
    pipe.save_pretrained(tmp_path / "pipe")
    path = generate_grid(
        str(tmp_path / "pipe"), tmp_path / "g.png", images=images, seed=0, steps=1, protocol="digits-dit", columns=10
    )
    with Image.open(path) as grid:
        assert (grid.mode, grid.size) == (mode, (32 * images, 32))
    figures = evaluate(pipe, protocol=protocol, reference=pipe, num_images=4, seeds=[1], steps=1)
    assert figures["mean"]["fid_fp"] < 1e-9


def test_other_numbers_of_channels_are_one_clear_error():
    with pytest.raises(QuantDMError, match=r"made \(1, 32, 32, 4\), expected images .* one channel or three"):
        generate(tiny_pipeline(4), load_protocol("digits-dit"), [0], steps=1)


@pytest.mark.parametrize(("images", "seeds"), [(1, [1]), (0, [1]), (2, []), (2, [-1])])
def test_too_few_images_are_refused_at_the_door(dit, images, seeds):
    with pytest.raises(QuantDMError, match="expected"):
        evaluate(dit, protocol=load_protocol("digits-dit"), num_images=images, seeds=seeds, steps=1)
    with pytest.raises(QuantDMError, match="got no seeds"):
        generate(dit, load_protocol("digits-dit"), [])


@pytest.mark.parametrize("name", ["label_images", "label_steps", "verify_images", "noise_images"])
def test_an_effort_that_measures_nothing_is_refused(name):
    with pytest.raises(QuantDMError, match=f"effort: {name}: got 0"):
        Effort(**{name: 0})
