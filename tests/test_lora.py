"""A LoRA on a quantized model: it changes the output, is trained alone, comes off exactly, is fused beside codes."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

import quantdm
from quantdm.errors import QuantDMError
from quantdm.hub import apply_recipe
from quantdm.modules import RESIDENCIES, packed_layers, set_residency
from quantdm.recipe import Recipe
from tests.family_models import answer, inputs_of, make

LABELS = ("kmeans-channel-3", "uniform-channel-2", "log2-channel-3")  # each has every residency
FAMILIES = ("sd-1.5", "sd3", "flux")


def quantized(family: str) -> nn.Module:
    """Return a tiny denoiser or text encoder with every layer packed, and no other trainable weight."""
    model = make(family)
    names = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    layers = {name: LABELS[i % len(LABELS)] for i, name in enumerate(names)}
    apply_recipe(model, Recipe(model=family, layers=layers), insist=True).requires_grad_(False)
    return model


def everywhere(model: nn.Module) -> LoraConfig:
    """Ask for a LoRA on every packed layer, convolutions too; it starts at random, not at zero."""
    return LoraConfig(r=2, target_modules=list(packed_layers(model)), init_lora_weights=False)


def add(model: nn.Module, name: str = "style") -> nn.Module:
    """Add a LoRA by the mixin of diffusers or of transformers."""
    torch.manual_seed(1)
    model.add_adapter(everywhere(model), adapter_name=name)
    return model


@pytest.mark.parametrize(
    "residency",
    [pytest.param(form, marks=pytest.mark.integer_convolution) if form == "integer" else form for form in RESIDENCIES],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_changes_the_output_and_comes_off_exactly(family: str, residency) -> None:
    model = quantized(family)
    layers = {name: type(layer) for name, layer in packed_layers(model).items()}
    set_residency(model, residency)
    y = answer(model)
    z = answer(add(model))
    assert not torch.equal(z, y)
    model.disable_adapters()
    assert torch.equal(answer(model), y)
    model.enable_adapters()
    assert torch.equal(answer(model), z)
    model.set_adapters("style", 0.5)
    half = answer(model)
    assert not torch.equal(half, z)
    assert not torch.equal(half, y)
    model.delete_adapters("style")
    assert torch.equal(answer(model), y)
    model.unload_lora()
    assert {name: type(layer) for name, layer in packed_layers(model).items()} == layers
    assert torch.equal(answer(model), y)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_lora_alone(family: str) -> None:
    model = add(quantized(family))
    bytes_ = {name: layer.packed.clone() for name, layer in packed_layers(model).items()}
    model(**inputs_of(model))[0].square().mean().backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert any(parameter.grad.any() for name, parameter in model.named_parameters() if name in learning)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert all(torch.equal(layer.packed, bytes_[name]) for name, layer in packed_layers(model).items())


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_fusing_is_refused_and_changes_nothing(family: str, safe: bool) -> None:
    model = add(quantized(family))
    z = answer(model)
    with pytest.raises(QuantDMError, match=r"fusing a LoRA.*dequantize\(\).*un-fused"):
        model.fuse_lora(safe_fusing=safe)
    assert torch.equal(answer(model), z)
    model.unload_lora()
    model.dequantize()  # as the message says
    add_dense = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    model.add_adapter(add_dense)
    model.fuse_lora()


@pytest.mark.parametrize("merge", [lambda model: model.merge_adapter(), lambda model: model.merge_and_unload()])
def test_peft_alone_works_on_classes_without_the_mixin(merge: Callable[[PeftModel], object]) -> None:
    model = quantized("pixart")
    y = answer(model)
    wrapped = get_peft_model(model, everywhere(model))
    z = answer(model)  # PEFT changes the model in place
    assert not torch.equal(z, y)
    with wrapped.disable_adapter():
        assert torch.equal(answer(model), y)
    with pytest.raises(QuantDMError, match="fusing a LoRA"):
        merge(wrapped)
    assert torch.equal(answer(model), z)
    assert torch.equal(answer(wrapped.unload()), y)


def test_a_lora_on_a_text_encoder_comes_off_exactly() -> None:
    model = quantized("clip")
    y = answer(model)
    assert not torch.equal(answer(add(model)), y)
    model.disable_adapters()
    assert torch.equal(answer(model), y)


def test_the_weights_of_a_lora_are_saved_and_loaded_as_always(tmp_path: Path) -> None:
    pipe = quantdm.load_pipeline("digits-sd")
    names = [record.name for record in quantdm.list_layers(pipe.unet)]
    quantdm.apply_recipe(
        pipe, quantdm.QuantConfig.uniform(names, quantdm.Scheme.parse("uniform-channel-4")), insist=True
    )
    pipe.set_progress_bar_config(disable=True)

    def image(scale: float = 1.0) -> torch.Tensor:
        return torch.from_numpy(
            pipe(
                "seven",
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(0),
                output_type="np",
                cross_attention_kwargs={"scale": scale},
            ).images
        )

    plain = image()
    torch.manual_seed(1)
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    attention = LoraConfig(r=2, lora_alpha=2, target_modules=layers, init_lora_weights=False)  # a file has no alpha
    pipe.unet.add_adapter(attention, adapter_name="style")
    styled = image()
    assert not torch.equal(styled, plain)
    trained = get_peft_model_state_dict(pipe.unet, adapter_name="style")
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=trained)
    assert all("lora" in key for key in load_file(tmp_path / "pytorch_lora_weights.safetensors"))

    pipe.unload_lora_weights()
    assert torch.equal(image(), plain)
    pipe.load_lora_weights(tmp_path, adapter_name="again")
    assert torch.equal(image(), styled)
    assert torch.equal(image(scale=0.0), plain)
    with pytest.raises(QuantDMError, match="fusing a LoRA"):
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(image(), plain)
    pipe.save_pretrained(tmp_path / "pipe")


def test_a_lora_of_the_dense_model_fits_the_quantized_one() -> None:
    dense, small = make("sd-1.5"), quantized("sd-1.5")
    torch.manual_seed(1)
    config = everywhere(small)
    dense.add_adapter(config)
    small.add_adapter(config)
    trained = get_peft_model_state_dict(dense)
    assert not set_peft_model_state_dict(small, trained).unexpected_keys
    assert all(torch.equal(value, trained[key]) for key, value in get_peft_model_state_dict(small).items())


def test_a_model_with_a_lora_on_it_is_not_saved_as_if_it_were_plain(tmp_path: Path) -> None:
    model = add(quantized("sd3"))
    with pytest.raises(QuantDMError, match=r"wrapped after quantization.*unload\s+adapters before saving"):
        model.save_pretrained(tmp_path)
    model.unload_lora()
    model.save_pretrained(tmp_path)


def max_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference, in units of the largest value."""
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("residency", ["packed", "dense"])
@pytest.mark.parametrize("family", [*FAMILIES, "clip"])
def test_quantdm_fuses_a_lora_beside_the_codes_and_takes_it_off_exactly(family: str, residency) -> None:
    model = quantized(family)
    set_residency(model, residency)
    bytes_ = {name: layer.packed.clone() for name, layer in packed_layers(model).items()}
    y, z = answer(model), answer(add(model))
    assert quantdm.fuse_lora(model) is model
    assert max_difference(answer(model), z) < 1e-5
    layers = packed_layers(model)
    assert {layer.residency for layer in layers.values()} == {residency}
    assert {(layer.scheme.lora, layer.scheme.wide) for layer in layers.values()} == {(2, True)}
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]
    z_2 = answer(add(model, "second"))  # on top of the one that is fused
    quantdm.fuse_lora(model, lora_scale=1)
    assert max_difference(answer(model), z_2) < 1e-5
    assert {layer.scheme.lora for layer in layers.values()} == {4}
    quantdm.unfuse_lora(model)
    assert torch.equal(answer(model), y)
    assert all(torch.equal(layer.packed, bytes_[name]) for name, layer in packed_layers(model).items())
    with pytest.raises(QuantDMError, match="no LoRA is fused"):
        quantdm.unfuse_lora(model)


def test_parts_whose_layers_have_the_same_names_are_fused_each() -> None:
    parts = {"text_encoder": add(quantized("clip")), "text_encoder_2": add(quantized("clip"))}
    loaded = {name: answer(model) for name, model in parts.items()}
    quantdm.fuse_lora(SimpleNamespace(components=parts))
    for name, model in parts.items():
        assert all(layer.scheme.lora is not None for layer in packed_layers(model).values())
        torch.testing.assert_close(answer(model), loaded[name], rtol=1e-4, atol=1e-5)


def test_a_fused_lora_is_saved_and_opened_with_the_pipeline(tmp_path: Path) -> None:
    pipe = quantdm.load_pipeline("digits-sd")
    scheme = quantdm.Scheme.parse("kmeans-channel-4-lowrank-2")
    names = [record.name for record in quantdm.list_layers(pipe.unet) if "attn" in record.name]
    rules = dict.fromkeys(names, scheme.label)
    quantdm.apply_recipe(pipe, Recipe(model="digits-sd", layers=rules, default="original"), insist=True)
    y = answer(pipe.unet)
    attention = LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(2)
    pipe.unet.add_adapter(attention, adapter_name="first")
    trained = {k: v.half() for k, v in get_peft_model_state_dict(pipe.unet, adapter_name="first").items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=trained)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "lora", adapter_name="style")
    pipe.set_adapters("style", 0.7)
    z = answer(pipe.unet)
    quantdm.fuse_lora(pipe)
    fused = answer(pipe.unet)
    assert max_difference(fused, z) < 1e-5
    assert {layer.scheme.label for layer in packed_layers(pipe.unet).values() if layer.scheme.lora} == {
        "kmeans-channel-4-lowrank-2-lora-3"  # in 16 bits, as it was trained
    }
    pipe.save_pretrained(tmp_path / "fused")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "fused")
    assert torch.equal(answer(again.unet), fused)
    quantdm.unfuse_lora(again)
    assert torch.equal(answer(again.unet), y)


def test_what_cannot_be_fused_is_refused_and_stays() -> None:
    model = quantized("sd-1.5")
    with pytest.raises(QuantDMError, match="no active LoRA"):
        quantdm.fuse_lora(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_out.0"], lora_bias=True, init_lora_weights=False))
    z = answer(model)
    with pytest.raises(QuantDMError, match="no plain LoRA"):
        quantdm.fuse_lora(model)
    assert torch.equal(answer(model), z)
    dense = make("sd3")
    dense.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    with pytest.raises(QuantDMError, match="is not packed"):
        quantdm.fuse_lora(dense)
