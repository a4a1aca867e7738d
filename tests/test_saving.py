"""Whatever is saved can be opened, bit by bit the same; what could not be opened is refused before a file is made."""

import copy
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

import quantdm
from quantdm.errors import QuantDMError
from quantdm.hub import QuantDMConfig, apply_recipe
from quantdm.modules import dequantize_module_, packed_layers, quantize_module_
from quantdm.quantizers import quantize_weight
from quantdm.recipe import Recipe
from quantdm.schemes import Scheme
from tests.family_models import CLIP, FAMILIES, TEXT_ENCODERS, answer, make, open_
from tests.hub_models import mixed_recipe

EVERYWHERE = Recipe(model="tiny", default="uniform-channel-4")
DECODER = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
BERT = {key: value for key, value in DECODER.items() if key not in ("head_dim", "num_key_value_heads")}
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
TEXTS: dict[str, tuple[str, dict[str, object]]] = {
    f"{cls}, {'tied' if tied else 'untied'}": (cls, {**config, "tie_word_embeddings": tied})
    for cls, config in {
        "LlamaForCausalLM": DECODER,
        "Qwen3ForCausalLM": DECODER,
        "Gemma2ForCausalLM": DECODER,
        "T5ForConditionalGeneration": TEXT_ENCODERS["t5"][1],
        "BertForMaskedLM": BERT,
    }.items()
    for tied in (True, False)
} | {
    "UMT5EncoderModel": ("UMT5EncoderModel", TEXT_ENCODERS["t5"][1]),
    "Qwen3Model": ("Qwen3Model", DECODER),
    "SiglipVisionModel": ("SiglipVisionModel", VISION),
    "CLIPModel": ("CLIPModel", {"text_config": CLIP, "vision_config": VISION}),
}


def quantized(family: str) -> nn.Module:
    """Return a tiny denoiser with all methods and layers that stay as they are."""
    model = make(family)
    return apply_recipe(model, mixed_recipe(model), insist=True).requires_grad_(False)


def with_lora(model: nn.Module, *, on_packed: bool) -> nn.Module:
    """Put a LoRA on the Linear layers that are packed, or on those that stayed as they were."""
    packed = packed_layers(model)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and (n in packed) == on_packed]
    assert names
    model.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    return model


def text_model(name: str) -> PreTrainedModel:
    """Build a tiny model of transformers with random weights."""
    cls, config = TEXTS[name]
    torch.manual_seed(0)
    made = getattr(transformers, cls)
    return made(made.config_class(**config)).eval()


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Tell whether two models hold the same tensors."""
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def replaced(model: nn.Module) -> nn.Module:
    """Put an ordinary layer of another size in the place of one that stayed as it was."""
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in packed_layers(model))
    old = model.get_submodule(name)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Linear(old.in_features, old.out_features + 4, old.bias is not None))
    return model


def sharing(model: nn.Module) -> nn.Module:
    """Let two normalizations share their parameters."""
    model.up_blocks[0].resnets[0].norm2 = model.up_blocks[0].resnets[1].norm2
    return model


CHANGES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "fused projections": (lambda m: m.fuse_qkv_projections(), r"unfuse_qkv_projections\(\) before saving"),
    "adapter on packed layers": (lambda m: with_lora(m, on_packed=True), "unload adapters before saving"),
    "adapter on original layers": (lambda m: with_lora(m, on_packed=False), "unload adapters before saving"),
    "another size": (replaced, r"has the shape \(.*undo the change before saving"),
    "a new layer": (lambda m: m.add_module("more", nn.Linear(2, 2)), r"first more\.bias.*undo it, or dequantize\(\)"),
    "a lost layer": (lambda m: delattr(m, "conv_norm_out"), r"first conv_norm_out\.bias"),
    "shared parameters": (sharing, "share their memory.*before saving"),
    "dense again": (lambda m: dequantize_module_(m, "conv_in"), "wrapped after quantization, first conv_in"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("copied", [False, True], ids=["", "copied"])
def test_what_could_not_be_opened_is_refused_before_a_file_is_made(change: str, copied: bool, tmp_path: Path) -> None:
    model = quantized("sd-1.5")
    model = copy.deepcopy(model) if copied else model
    do, message = CHANGES[change]
    do(model)
    with pytest.raises(QuantDMError, match=message):
        model.save_pretrained(tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_a_refused_text_encoder_leaves_nothing_either(tmp_path: Path) -> None:
    model = apply_recipe(make("clip"), EVERYWHERE, insist=True)
    model.add_module("more", nn.Linear(2, 2))
    with pytest.raises(QuantDMError, match=r"first more\.bias"):
        model.save_pretrained(tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_the_remedies_work(tmp_path: Path) -> None:
    model = quantized("sd-1.5")
    y = answer(model)
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()
    model.save_pretrained(tmp_path / "unfused")
    assert torch.equal(answer(open_(tmp_path / "unfused")), y)
    with_lora(model, on_packed=False).unload_lora()
    model.save_pretrained(tmp_path / "unloaded", max_shard_size="20KB")
    assert torch.equal(answer(open_(tmp_path / "unloaded")), y)


def test_a_layer_that_was_packed_anew_is_saved_as_it_is(tmp_path: Path) -> None:
    model = quantized("sd-1.5")
    weight = dequantize_module_(model, "conv_in").weight.detach()
    quantize_module_(model, "conv_in", quantize_weight(weight, Scheme.parse("uniform-channel-7")))
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(open_(tmp_path)), answer(model))


@pytest.mark.parametrize("size", ["50GB", "10KB"], ids=["whole", "shards"])
@pytest.mark.parametrize("name", TEXTS)
def test_models_of_transformers_open_with_all_their_weights(name: str, size: str, tmp_path: Path) -> None:
    model = apply_recipe(text_model(name), EVERYWHERE, insist=True)
    model.save_pretrained(tmp_path, max_shard_size=size)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert len(packed_layers(again)) == len(packed_layers(model)) > 10
    assert same_state(again, model)


@pytest.mark.parametrize("name", ["LlamaForCausalLM, tied", "T5ForConditionalGeneration, tied"])
def test_a_tied_layer_is_its_own_once_it_is_packed(name: str, tmp_path: Path) -> None:
    ids = torch.arange(3, 13)[None]
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if name.startswith("T5") else {})
    dense = text_model(name)
    dense.save_pretrained(tmp_path / "dense")
    model = apply_recipe(dense, EVERYWHERE, insist=True)
    y = model(**inputs)[0]
    assert "lm_head" in packed_layers(model)
    fly = type(model).from_pretrained(
        tmp_path / "dense", dtype=torch.float32, quantization_config=QuantDMConfig(recipe=EVERYWHERE)
    )
    assert torch.equal(fly(**inputs)[0], y)
    fly.save_pretrained(tmp_path / "fly")
    again = type(model).from_pretrained(tmp_path / "fly", dtype=torch.float32)
    again.tie_weights()  # as resizing the embedding does
    assert torch.equal(again(**inputs)[0], y)
    again.dequantize()
    again.save_pretrained(tmp_path / "back")
    assert torch.equal(type(model).from_pretrained(tmp_path / "back", dtype=torch.float32)(**inputs)[0], y)


def quantized_pipeline() -> DiffusionPipeline:
    """Return the embedded pipeline with denoiser and text encoder quantized."""
    pipe = quantdm.load_pipeline("digits-sd")
    return apply_recipe(
        pipe, Recipe(model="sd", default="uniform-channel-4", components={"text_encoder": EVERYWHERE}), insist=True
    )


@pytest.mark.parametrize("size", ["10GB", "200KB"], ids=["whole", "shards"])
def test_a_variant_opens_by_its_name_and_alone_without(size: str, tmp_path: Path) -> None:
    pipe = quantized_pipeline()
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    for again in (
        quantdm.load_pipeline(tmp_path),
        quantdm.load_pipeline(tmp_path, variant="fp16"),
        DiffusionPipeline.from_pretrained(tmp_path, variant="fp16"),
    ):
        assert same_state(again.unet, pipe.unet)
        assert same_state(again.text_encoder, pipe.text_encoder)
    pipe.save_pretrained(tmp_path, variant="other", max_shard_size=size)
    with pytest.raises(QuantDMError, match=r"variants fp16, other; say which: variant="):
        quantdm.load_pipeline(tmp_path)
    pipe.save_pretrained(tmp_path)  # the ordinary files beside the variants; transformers deletes the variants' shards
    for variant in (None, "fp16", "other") if size == "10GB" else (None,):
        assert same_state(quantdm.load_pipeline(tmp_path, variant=variant).unet, pipe.unet)


def test_a_variant_with_other_bits_has_its_own_table(tmp_path: Path) -> None:
    for bits in (3, 4):
        model = apply_recipe(make("sd-1.5"), Recipe(model="tiny", default=f"uniform-channel-{bits}"), insist=True)
        model.save_pretrained(tmp_path, variant=f"{bits}bit")
    cls = getattr(diffusers, FAMILIES["sd-1.5"][0])
    for bits in (3, 4):
        layers = packed_layers(cls.from_pretrained(tmp_path, variant=f"{bits}bit"))
        assert {layer.label for layer in layers.values()} == {f"uniform-channel-{bits}"}


def test_a_text_encoder_saved_over_its_shards_opens(tmp_path: Path) -> None:
    pipe = quantized_pipeline()
    pipe.save_pretrained(tmp_path)
    pipe.text_encoder.save_pretrained(tmp_path / "text_encoder", max_shard_size="200KB")
    pipe.text_encoder.save_pretrained(tmp_path / "text_encoder")  # transformers leaves the index and drops its files
    assert same_state(quantdm.load_pipeline(tmp_path).text_encoder, pipe.text_encoder)
