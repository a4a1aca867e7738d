"""Code that knows nothing of packed layers works on them: adapters, casts, pipelines and models made of a model."""

import copy
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoencoderKL,
    AutoPipelineForImage2Image,
    ControlNetModel,
    ControlNetUnionModel,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxTransformer2DModel,
    SD3ControlNetModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UNetMotionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from quantdm.activations import activation_spec, set_activation_bits_
from quantdm.denoisers.inventory import list_layers
from quantdm.errors import QuantDMError
from quantdm.hub import apply_recipe
from quantdm.modules import packed_layers, set_residency
from quantdm.recipe import ActivationSpec, Recipe
from tests.family_models import MMDIT, answer, inputs_of, make
from tests.hub_models import mixed_recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PIPELINES = {
    "sd-1.5": ("StableDiffusionPipeline", "unet"),
    "sdxl": ("StableDiffusionXLPipeline", "unet"),
    "sd3": ("StableDiffusion3Pipeline", "transformer"),
    "flux": ("FluxPipeline", "transformer"),
    "chroma": ("ChromaPipeline", "transformer"),
    "wan": ("WanPipeline", "transformer"),
    "sana": ("SanaPipeline", "transformer"),
    "aura-flow": ("AuraFlowPipeline", "transformer"),
    "cogview4": ("CogView4Pipeline", "transformer"),
}


def quantized(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tiny denoiser with all methods and layers that stay as they are."""
    model = make(family).to(dtype)
    return apply_recipe(model, mixed_recipe(model), insist=True).requires_grad_(False)


def pipeline_of(cls: str, part: str, model: nn.Module) -> Any:
    """Build a pipeline that has nothing but a denoiser and a scheduler."""
    made = getattr(diffusers, cls)
    modules, _ = made._get_signature_keys(made)
    scheduler = DDIMScheduler() if part == "unet" else FlowMatchEulerDiscreteScheduler()
    parts = dict.fromkeys(modules) | {part: model, "scheduler": scheduler}
    return made(**parts, **({"requires_safety_checker": False} if "safety_checker" in modules else {}))


# ------------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_pipeline_loads_and_unloads_adapters_as_ever(family: str, tmp_path: Path) -> None:
    cls, part = PIPELINES[family]
    dense = make(family)
    names = [name for name, _ in dense.named_modules() if name.rpartition(".")[2] in ("to_q", "to_k", "to_v")]
    torch.manual_seed(1)
    dense.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False))
    trained = {f"{part}.{key}": value.contiguous() for key, value in get_peft_model_state_dict(dense).items()}
    save_file(trained, tmp_path / "pytorch_lora_weights.safetensors")
    model = quantized(family)
    y = answer(model)
    pipe = pipeline_of(cls, part, model)
    pipe.load_lora_weights(tmp_path, adapter_name="first")
    z = answer(model)
    assert not torch.equal(z, y)
    pipe.load_lora_weights(tmp_path, adapter_name="second")
    pipe.set_adapters(["first"])
    assert torch.equal(answer(model), z)
    pipe.unload_lora_weights()
    assert torch.equal(answer(model), y)


def test_a_control_adapter_widens_a_packed_layer() -> None:
    model = quantized("flux")
    y = answer(model)
    layer = model.x_embedder
    width, inner = layer.in_features, layer.out_features
    assert "x_embedder" in packed_layers(model)
    pipe = pipeline_of("FluxControlPipeline", "transformer", model)
    adapter = {
        "transformer.x_embedder.lora_A.weight": torch.randn(2, 2 * width),
        "transformer.x_embedder.lora_B.weight": torch.zeros(inner, 2),
        "transformer.transformer_blocks.0.attn.norm_q.weight": torch.ones(16),
    }
    pipe.load_lora_weights(adapter, adapter_name="control")
    inputs = inputs_of(model)
    latents = inputs.pop("hidden_states")[..., :width]
    with torch.no_grad():
        wide = model(hidden_states=torch.cat([latents, torch.rand_like(latents)], dim=-1), **inputs)[0]
    assert torch.isfinite(wide).all()
    pipe.unload_lora_weights(reset_to_overwritten_params=True)
    assert torch.equal(answer(model), y)


def test_an_image_adapter_is_loaded_and_unloaded(tmp_path: Path) -> None:
    model = quantized("sd-1.5", torch.bfloat16)
    y = answer(model)
    weights: dict[str, torch.Tensor] = {}
    for name in model.attn_processors:
        if name.endswith("attn2.processor"):
            number, width = len(weights) + 1, model.get_submodule(name.removesuffix("processor") + "to_q").in_features
            weights |= {f"{number}.to_{part}_ip.weight": torch.randn(width, 12) for part in "kv"}
    projection = {"proj.weight": (48, 10), "proj.bias": (48,), "norm.weight": (12,), "norm.bias": (12,)}
    adapter = {"image_proj": {key: torch.rand(size) for key, size in projection.items()}, "ip_adapter": weights}
    pipe = pipeline_of("StableDiffusionPipeline", "unet", model)
    pipe.load_ip_adapter(adapter, subfolder=None, weight_name=None, image_encoder_folder=None)
    image = {"added_cond_kwargs": {"image_embeds": [torch.rand(1, 1, 10).bfloat16()]}}
    assert not torch.equal(model(**(inputs_of(model) | image))[0], y)
    with pytest.raises(QuantDMError, match=r"unload_ip_adapter\(\) before saving"):
        model.save_pretrained(tmp_path / "with")
    pipe.unload_ip_adapter()
    assert torch.equal(answer(model), y)
    model.save_pretrained(tmp_path / "without")
    assert torch.equal(answer(type(model).from_pretrained(tmp_path / "without", torch_dtype=torch.bfloat16)), y)


# --------------------------------------------------------------------------- other pipelines of the same components


def stable_diffusion(dtype: torch.dtype) -> DiffusionPipeline:
    """Build a tiny pipeline with denoiser and text encoder quantized."""
    text = apply_recipe(make("clip").to(dtype), Recipe(model="clip", default="uniform-channel-4"), insist=True)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).to(dtype)
    unet = quantized("sd-1.5", dtype)
    return StableDiffusionPipeline(vae, text, None, unet, DDIMScheduler(), None, None, requires_safety_checker=False)


def dtypes_of(pipe: DiffusionPipeline) -> set[torch.dtype]:
    """Return the dtypes of all floating tensors of a pipeline."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    found = {t.dtype for part in parts for t in part.state_dict().values() if t.is_floating_point()}
    return found | {layer.weight.dtype for part in parts for layer in packed_layers(part).values()}


FROM: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "from_pipe": (StableDiffusionImg2ImgPipeline.from_pipe, {}),
    "auto": (AutoPipelineForImage2Image.from_pipe, {}),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("way", FROM)
def test_another_pipeline_of_the_same_components_in_their_dtype_changes_nothing(way: str, dtype: torch.dtype) -> None:
    pipe = stable_diffusion(dtype)
    y = answer(pipe.unet)
    new = FROM[way][0](pipe, torch_dtype=dtype)
    assert new.unet is pipe.unet
    assert dtypes_of(new) == dtypes_of(pipe) == {dtype}
    assert torch.equal(answer(new.unet), y)


def test_a_pipeline_is_cast_as_a_whole() -> None:
    pipe = stable_diffusion(torch.bfloat16)
    stored = {name: layer.packed.clone() for name, layer in packed_layers(pipe.unet).items()}
    new = StableDiffusionImg2ImgPipeline.from_pipe(pipe)  # float32 is diffusers' default
    assert dtypes_of(new) == {torch.float32}
    new.to(torch.bfloat16)
    assert dtypes_of(pipe) == {torch.bfloat16}
    assert all(torch.equal(layer.packed, stored[name]) for name, layer in packed_layers(pipe.unet).items())


def test_a_controlnet_made_of_the_denoiser_joins_it_in_a_pipeline() -> None:
    unet = quantized("sdxl")
    base: Any = pipeline_of("StableDiffusionXLPipeline", "unet", unet)
    assert isinstance(base, StableDiffusionXLPipeline)
    new = StableDiffusionXLControlNetPipeline.from_pipe(base, controlnet=ControlNetModel.from_unet(unet))
    assert new.unet is unet


def test_layerwise_casting_leaves_the_packed_weights_as_they_are() -> None:
    model = quantized("sd-1.5")
    layers = {name: layer.dequantize() for name, layer in packed_layers(model).items()}
    y = answer(model)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert torch.allclose(answer(model), y, atol=0.2 * float(y.abs().max()))
    for name, layer in packed_layers(model).items():
        assert torch.equal(layer.dequantize(dtype=torch.float32), layers[name])


# ------------------------------------------------------------------------------------ other models made of a model

FLUX = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
MADE_OF: dict[str, tuple[str, Callable[[Any], nn.Module]]] = {
    "ControlNet": ("sd-1.5", ControlNetModel.from_unet),
    "ControlNet of SDXL": ("sdxl", ControlNetModel.from_unet),
    "ControlNet Union": ("sdxl", ControlNetUnionModel.from_unet),
    "motion model": ("sd-1.5", UNetMotionModel.from_unet2d),
    "ControlNet of SD 3": ("sd3", lambda model: SD3ControlNetModel.from_transformer(model, num_layers=1)),
    "ControlNet of FLUX": ("flux", lambda model: FluxControlNetModel.from_transformer(model, **FLUX)),
}


@pytest.mark.parametrize("name", MADE_OF)
def test_a_model_made_of_a_packed_one_has_its_decoded_weights(name: str) -> None:
    family, make_of = MADE_OF[name]
    model = quantized(family)
    made = make_of(model)
    assert not packed_layers(made)
    dense = model.dequantize().state_dict()
    expected = make_of(model).state_dict()  # some of its layers are new, and random
    copied = [key for key in expected if key in dense and torch.equal(expected[key], dense[key])]
    assert len([key for key in copied if key.endswith(".weight")]) > 20
    assert all(torch.equal(made.state_dict()[key], dense[key]) for key in copied)


def test_a_state_dict_lists_what_is_stored_and_answers_for_the_weight(tmp_path: Path) -> None:
    model = quantized("sd-1.5")
    state = model.state_dict()
    layer = model.conv_in
    assert "conv_in.packed" in state
    assert "conv_in.weight" not in [*state]
    assert state["conv_in.weight"].shape == layer.weight.shape
    assert torch.equal(torch.clone(state["conv_in.weight"]), layer.dequantize())
    for missing in ("conv_in.scale", "no.weight", "conv_norm_out.packed"):
        with pytest.raises(KeyError):
            state[missing]
    torch.save(state, tmp_path / "state.pt")
    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    assert type(stored) is OrderedDict
    assert stored.keys() == state.keys()
    other = quantized("sd-1.5")
    other.conv_in.packed.data.zero_()
    other.load_state_dict(stored)
    assert torch.equal(answer(other), answer(model))


def test_the_state_dict_of_a_part_goes_into_packed_and_into_dense_parts(tmp_path: Path) -> None:
    model, other, dense = quantized("sd-1.5"), quantized("sd-1.5"), make("sd-1.5")
    part = model.down_blocks.state_dict()
    assert not [key for key in part if key.endswith(".packed")]
    for layer in packed_layers(other.down_blocks).values():
        layer.packed.data.zero_()
    other.down_blocks.load_state_dict(part)  # bytes into bytes
    assert torch.equal(answer(other), answer(model))
    dense.down_blocks.load_state_dict(part)
    torch.save(part, tmp_path / "part.pt")
    stored = torch.load(tmp_path / "part.pt", weights_only=True)
    for name, layer in packed_layers(model.down_blocks).items():
        assert torch.equal(dense.down_blocks.get_submodule(name).weight, layer.dequantize())
        assert torch.equal(stored[f"{name}.weight"], layer.dequantize())
    with pytest.raises(RuntimeError, match="packed"):
        other.down_blocks.load_state_dict(stored)  # a dense weight has no codes


def test_a_model_inside_another_module_keeps_its_bytes() -> None:
    outer = nn.ModuleDict({"unet": quantized("sd-1.5")})
    assert "unet.conv_in.packed" in outer.state_dict()
    compiled: Any = torch.compile(outer["unet"], backend="aot_eager")
    assert any(key.endswith("conv_in.packed") for key in compiled.state_dict())
    cpu_offload(outer["unet"], torch.device("cpu"))
    assert torch.isfinite(answer(outer["unet"])).all()


# ------------------------------------------------------------------------------------------ compilation, half-done

BLOCKS = 12
SCHEMES = (
    *(f"uniform-channel-{bits}" for bits in (2, 3, 4, 5)), *(f"kmeans-channel-{bits}" for bits in (2, 3, 4)),
    "kmeans-tensor-4", "log2-channel-3", "log2-channel-4", "uniform-group16-4", "kmeans-group32-3",
)  # fmt: skip


@pytest.mark.parametrize("residency", ["packed", "int8", "dense"])
@pytest.mark.filterwarnings("ignore:int8 residency")
def test_blocks_with_a_scheme_each_are_compiled_once(residency: Any) -> None:
    torch.manual_seed(0)
    model: Any = FluxTransformer2DModel(
        **{**MMDIT, "num_layers": BLOCKS, "num_single_layers": 1, "pooled_projection_dim": 8, "guidance_embeds": True}
    )
    names = [record.name for record in list_layers(model)]
    layers = {name: SCHEMES[int(found.group(1))] for name in names if (found := re.match(r"\w+_blocks\.(\d+)", name))}
    apply_recipe(model, Recipe(model="flux", layers=dict.fromkeys(names) | layers), insist=True)
    set_residency(model, residency)
    y = answer(model)
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counted)
    assert torch.equal(answer(model), y)
    if residency != "int8":  # there the form of a layer is part of the graph
        assert counted.frame_count == 2  # one for each class of blocks


def test_a_copied_compiled_layer_decodes_its_own_bytes() -> None:
    first = quantized("sd-1.5")
    second = copy.deepcopy(first)
    second.conv_in.packed.data = torch.zeros_like(second.conv_in.packed)
    y = second.conv_in(torch.ones(1, 4, 8, 8))
    compiled = torch.compile(second.conv_in, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.ones(1, 4, 8, 8)), y)
    assert not torch.equal(first.conv_in(torch.ones(1, 4, 8, 8)), y)


def test_an_exported_program_holds_the_bytes() -> None:
    layer = quantized("sd-1.5").conv_in
    x = torch.rand(1, 4, 8, 8)
    program = torch.export.export(layer, (x,))
    y = layer(x)
    del layer
    assert torch.equal(program.module()(x), y)


def test_a_model_that_cannot_be_dequantized_keeps_its_activations() -> None:
    model = quantized("sd-1.5")
    set_activation_bits_(model, ActivationSpec(bits=8))
    y = answer(model)
    hook = model.conv_out.register_forward_hook(lambda *_: None)
    with pytest.raises(QuantDMError, match="conv_out: carries hooks"):
        model.dequantize()
    assert activation_spec(model) == ActivationSpec(bits=8)
    assert torch.equal(answer(model), y)
    hook.remove()
    assert not packed_layers(model.dequantize())
