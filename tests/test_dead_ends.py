"""What stopped people with pipelines of their own: sizes, lists, errors of a call, cards that do not fit, costs."""

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDPMScheduler
from peft import LoraConfig
from typer.testing import CliRunner

import quantdm
from quantdm import Protocol, QuantDMError, Recipe, generate, load_protocol, look_at
from quantdm.cli.main import app
from quantdm.hub.card_snippet import signature_of, snippet, task_of
from quantdm.hub.card_source import head_of_source
from quantdm.hub.inspection import inspect_target
from quantdm.machine import fast_dtype
from quantdm.pipelines.checks import check_generates
from quantdm.pipelines.planning import example_call
from quantdm.pipelines.sizes import image_size
from quantdm.recipe import Provenance, Rules
from quantdm.runs.search import start_run
from quantdm.runs.settings import make_settings
from quantdm.schemes import Scheme
from tests.pipeline_kinds import BarePipeline, make, unet
from tests.two_denoisers import make_wan


class Wordy(BarePipeline):
    """Says its size in its call, takes a list of words, and cannot add what it is given."""

    def __call__(self, words: list[str] = ["a"], strength: float = 1.0, height: int = 48, width: int = 64):  # noqa: B006
        """Fail as a network does whose inputs do not fit each other."""
        return torch.zeros(2) + torch.zeros(3)


@pytest.fixture(scope="module")
def wordy():
    return Wordy(unet(), DDPMScheduler())


def asked(**said) -> Protocol:
    return Protocol(**{"version": 2, "steps": 1, "features": "pyramid", **said})


def test_a_resolution_scales_drawn_pictures_where_the_call_takes_no_size():
    pipe, protocol = make("image-to-image")
    small = Protocol(**protocol.model_copy(update={"resolution": 16}).model_dump())
    check_generates(pipe, small)
    assert generate(pipe, small, [1]).shape[-2:] == (16, 16)


def test_the_size_is_that_of_the_call_where_the_protocol_says_none(wordy):
    assert image_size(wordy, asked()) == (64, 48)
    assert image_size(wordy, asked(call={"height": 16})) == (64, 16)
    assert image_size(wordy, asked(resolution=32)) == (32, 32)


def test_what_only_takes_a_list_says_how_a_list_is_written(wordy):
    with pytest.raises(QuantDMError, match=r"expects list\[str\]; a list as it is: \{value: \[...\]\}"):
        check_generates(wordy, asked(call={"words": None}))
    check_generates(wordy, asked(call={"words": {"value": []}}))


def test_sizes_that_do_not_fit_are_one_clear_error(wordy):
    with pytest.raises(QuantDMError, match=r"Wordy: refused its call with .*: The size of tensor a \(2\) must match"):
        generate(wordy, asked(), [1])


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("FluxPipeline", "text-to-image"),
        ("StableDiffusionXLImg2ImgPipeline", "image-to-image"),
        ("StableDiffusionInpaintPipeline", "image-to-image"),
        ("WanPipeline", "text-to-video"),
        ("WanImageToVideoPipeline", "image-to-video"),
        ("AnimateDiffVideoToVideoPipeline", "video-to-video"),
        ("DDPMPipeline", "unconditional-image-generation"),
        ("DiTPipeline", "unconditional-image-generation"),
    ],
)
def test_a_card_knows_its_task_from_the_class(name, task, tmp_path):
    index = {"_class_name": name, "scheduler": ["diffusers", "X"], "vae": ["diffusers", "X"]}
    assert task_of(signature_of(index), index) == task
    code = snippet(tmp_path / "small", index)
    compile(code, "snippet", "exec")
    assert ("Image.new" in code) == (task.startswith(("image-to", "video-to")))
    assert (".frames[0]" in code) == task.endswith("video")


def test_a_snippet_asks_for_what_was_measured(tmp_path):
    pipe, protocol = make("inpainting")
    given = example_call(pipe, protocol)
    assert given["image"] == given["mask_image"] == {"picture": [32, 32]}
    code = snippet(tmp_path / "small", {"_class_name": type(pipe).__name__}, given)
    compile(code, "snippet", "exec")
    assert "num_inference_steps=2" in code
    assert "guidance_scale=2.0" in code
    assert "mask_image=mask_image" in code
    assert "generator" not in code


def test_the_head_of_a_card_follows_the_source_and_names_no_place(tmp_path):
    own = tmp_path / "mine"
    own.mkdir()
    assert head_of_source(own) == {}
    front = {"license": "other", "license_name": "its-own", "base_model": "some/base", "pipeline_tag": "x"}
    (own / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n# Mine\n")
    told = {"license": "other", "license_name": "its-own", "base_model": "some/base"}
    assert head_of_source(own) == told | {"base_model_relation": "quantized"}
    (own / "README.md").write_text("---\nbase_model: /home/me/base\nlicense: mit\n---\n")
    assert head_of_source(own) == {"license": "mit"}
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    assert head_of_source(snapshot)["base_model"] == "some/model"
    assert head_of_source("some/where-else")["base_model"] == "some/where-else"


def test_inspect_shows_every_part_and_marks_what_costs_more_than_it_seems():
    record = inspect_target("digits-sd", scheme="kmeans-channel-4")
    parts = {part["name"]: part for part in record["parts"]}
    assert set(parts) == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert all(parts[name]["nbytes"] > parts[name]["num_weights"] for name in ("unet", "vae", "text_encoder"))
    assert parts["scheduler"]["num_weights"] is None
    costly = {row["name"] for row in record["layers"] if row["costly"]}
    assert costly == {row["name"] for row in record["layers"] if row["bits"] > 5}
    assert 0 < len(costly) < len(record["layers"])
    text = (
        CliRunner().invoke(app, ["inspect", "digits-sd", "--scheme", "kmeans-channel-4"], catch_exceptions=False).stdout
    )
    assert all(len(line) <= 79 for line in text.splitlines())
    assert text.count("!") == len(costly) + 1  # and what it means
    assert "  vae " in text


def test_images_without_a_vae_are_made_in_float32(tmp_path: Path) -> None:
    pipe, _ = make("ddpm")
    pipe.save_pretrained(tmp_path / "ddpm")
    asked = {"target_bits": 4.0, "target_bytes": None, "trials": 30, "seed": 0}
    settings = make_settings(look_at(str(tmp_path / "ddpm")), **asked, protocol=load_protocol("unconditional"))
    assert settings.dtype == "float32"
    assert make_settings(look_at("digits-dit"), **asked).dtype == fast_dtype()


def test_a_loaded_adapter_is_told_to_be_fused_and_a_fused_one_is_the_truth_of_its_run(tmp_path: Path) -> None:
    pipe, layer = quantdm.load_pipeline("digits-sd"), "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    base = pipe.unet.get_submodule(layer).weight.clone()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    with pytest.raises(QuantDMError, match=r"an adapter is loaded .*fuse it first, pipe\.fuse_lora\(\)"):
        look_at(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = pipe.unet.get_submodule(layer).weight
    assert not torch.equal(fused, base)
    run, _ = start_run(look_at(pipe), tmp_path / "run", target_bits=4.0)
    again = run.open_subject()  # as `correct`, `tune` and workers open it
    assert torch.equal(again.pipe.unet.get_submodule(layer).weight, fused)
    recipe = Recipe(
        model="fused", default="uniform-channel-8", provenance=Provenance(weights=run.settings.seen.weights)
    )
    with pytest.raises(QuantDMError, match=r"other weights of unet .*fused LoRA"):
        quantdm.apply_recipe(quantdm.load_pipeline("digits-sd"), recipe)


def test_a_quantized_pipeline_is_refused_as_one_to_search_in_plain_words(tmp_path: Path) -> None:
    recipe = Recipe(model="digits-dit", default="uniform-channel-4")
    quantdm.export_pipeline("digits-dit", recipe, tmp_path / "small")
    with pytest.raises(QuantDMError, match="quantized already"):
        quantdm.search(str(tmp_path / "small"), target_bits=3.0, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("target", [2.01, 17.0])
def test_a_target_out_of_reach_is_refused_before_anything_is_written(target: float, tmp_path: Path) -> None:
    options = [Scheme.parse("uniform-channel-4"), Scheme.parse("uniform-channel-8")]
    with pytest.raises(QuantDMError, match=r"these options reach 4\.\d+ to 8\.\d+"):
        quantdm.run("digits-dit", target_bits=target, options=options, run_dir=tmp_path / "run", say=str)
    assert not (tmp_path / "run").exists()


def test_an_export_of_two_denoisers_can_be_inspected(tmp_path: Path) -> None:
    make_wan().save_pretrained(tmp_path / "wan")
    recipe = Recipe(model="wan", default="uniform-channel-4", components={"transformer_2": Rules(default="original")})
    quantdm.export_pipeline(str(tmp_path / "wan"), recipe, tmp_path / "small")
    record = inspect_target(str(tmp_path / "small"))
    assert {row["scheme"] for row in record["layers"] if ":" not in row["name"]} == {"uniform-channel-4"}
