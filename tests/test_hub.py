"""Apply, save and load through diffusers and transformers: really packed, bit-exact, and loud when something is wrong."""

import json
import struct
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoModel,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    PipelineQuantizationConfig,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
)
from diffusers.hooks import apply_group_offloading
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from quantdm.denoisers.layers import list_layers
from quantdm.errors import QuantDMError
from quantdm.hub import QuantDMConfig, QuantDMQuantizer, apply_recipe, register
from quantdm.modules import (
    activation_spec,
    default_keep_8bit,
    dense_weights,
    packed_layers,
    set_activation_bits_,
)
from quantdm.quantizers import count_bits, quantize_weight
from quantdm.recipe import ActivationSpec, Recipe
from quantdm.schemes import QuantConfig, Scheme

WEIGHTS = "diffusion_pytorch_model.safetensors"
MIXED = (
    "kmeans-channel-3",
    "uniform-channel-2",
    "kmeans-tensor-4",
    "log2-channel-5",
    "uniform-group16-6",
    None,
    "kmeans-group32-7",
    "uniform-tensor-8",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_dit() -> nn.Module:
    """Build a tiny DiT."""
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )


def make_pixart() -> nn.Module:
    """Build a tiny PixArt."""
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=12,
        use_additional_conditions=False,
    )


def make_unet() -> nn.Module:
    """Build a tiny Stable Diffusion U-Net with long skips."""
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
    )


MODELS = {"dit": make_dit, "pixart": make_pixart, "unet": make_unet}


@torch.no_grad()
def run(model: nn.Module) -> torch.Tensor:
    """Call a denoiser on fixed inputs in its own dtype."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=generator).to(model.dtype)
    text = torch.randn(2, 5, 12, generator=generator).to(model.dtype)
    time, labels = torch.tensor([10, 500]), torch.tensor([1, 2])
    if "class_labels" in model.forward.__code__.co_varnames and not isinstance(model, UNet2DConditionModel):
        return model(x, timestep=time, class_labels=labels, return_dict=False)[0]
    extra = {"added_cond_kwargs": {}} if isinstance(model, PixArtTransformer2DModel) else {}
    return model(x, timestep=time, encoder_hidden_states=text, return_dict=False, **extra)[0]


def mixed_recipe(model: nn.Module, activations: ActivationSpec | None = None) -> Recipe:
    """Give the layers all methods, 2 to 8 bits and no quantization in turn."""
    names = [record.name for record in list_layers(model)]
    return Recipe(model="tiny", layers=dict(zip(names, cycle(MIXED), strict=False)), activations=activations)


def uniform_config(model: nn.Module, label: str = "uniform-channel-3") -> QuantConfig:
    """Give every layer the same scheme."""
    return QuantConfig.uniform([record.name for record in list_layers(model)], Scheme.parse(label))


def contents(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Read the metadata and the tensors of a safetensors file (the order of metadata keys is random in the file)."""
    with safe_open(path, framework="pt") as file:
        return file.metadata(), load_file(path)


def equal_files(a: Path, b: Path) -> bool:
    """Tell whether two checkpoints hold the same."""
    (header_a, tensors_a), (header_b, tensors_b) = contents(a), contents(b)
    return (
        header_a == header_b
        and tensors_a.keys() == tensors_b.keys()
        and all(t.dtype == tensors_b[k].dtype and torch.equal(t, tensors_b[k]) for k, t in tensors_a.items())
    )


@pytest.fixture(scope="session")
def dense_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save the dense tiny models once: a bf16 model is one that from_pretrained loaded in bf16."""
    register()
    directory = tmp_path_factory.mktemp("dense")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(directory / name)
    return {name: directory / name for name in MODELS}


@pytest.fixture(scope="session")
def export(dense_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save one quantized DiT, to be damaged."""
    directory = tmp_path_factory.mktemp("export")
    model = DiTTransformer2DModel.from_pretrained(dense_dirs["dit"])
    apply_recipe(model, mixed_recipe(model)).save_pretrained(directory)
    return directory


@pytest.fixture
def damaged(export: Path, tmp_path: Path) -> Path:
    """Return a fresh copy of the export."""
    for file in export.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_opens_bit_by_bit_the_same(
    name: str, dtype: torch.dtype, dense_dirs: dict[str, Path], tmp_path: Path
) -> None:
    model = AutoModel.from_pretrained(dense_dirs[name], dtype=dtype)
    activations = ActivationSpec(bits=6, keep_8bit=default_keep_8bit(model))
    recipe = mixed_recipe(model, activations)
    assert apply_recipe(model, recipe) is model
    y = run(model)
    assert torch.isfinite(y).all()

    model.save_pretrained(tmp_path / "whole")
    whole = AutoModel.from_pretrained(tmp_path / "whole", dtype=dtype)
    assert torch.equal(run(whole), y)
    assert activation_spec(whole) == activations
    whole.save_pretrained(tmp_path / "again")
    assert equal_files(tmp_path / "whole" / WEIGHTS, tmp_path / "again" / WEIGHTS)

    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(run(AutoModel.from_pretrained(tmp_path / "shards", dtype=dtype)), y)

    with dense_weights(whole):
        assert torch.equal(run(whole), y)
    assert whole.dequantize() is whole
    assert not packed_layers(whole)
    assert activation_spec(whole) is None
    whole.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    dense = AutoModel.from_pretrained(tmp_path / "dense", dtype=dtype)
    set_activation_bits_(dense, activations)
    assert torch.equal(run(dense), y)

    fly = AutoModel.from_pretrained(dense_dirs[name], dtype=dtype, quantization_config=QuantDMConfig(recipe=recipe))
    assert torch.equal(run(fly), y)
    fly.save_pretrained(tmp_path / "fly")
    assert equal_files(tmp_path / "fly" / WEIGHTS, tmp_path / "whole" / WEIGHTS)


def test_bytes_are_the_same_whatever_dtype_they_are_loaded_in(export: Path) -> None:
    wide, narrow = (DiTTransformer2DModel.from_pretrained(export, dtype=dtype) for dtype in DTYPES.values())
    for name, layer in packed_layers(wide).items():
        other = packed_layers(narrow)[name]
        assert torch.equal(layer.packed, other.packed)
        assert (layer.weight.dtype, other.weight.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(layer.quantized.dequantize(dtype=torch.bfloat16), other.dequantize())
    # Integers are invisible to `model.dtype`, which pipelines cast latents to; fp16 scales would not be.
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)


FRESH = """
import sys, torch, quantdm
from diffusers import DiffusionPipeline
from quantdm.hub import register
register()
directory, dtype = sys.argv[1], getattr(torch, sys.argv[2])
torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained(directory, dtype=dtype)
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
images = pipe([1, 2], generator=generator, num_inference_steps=2, output_type="np").images
torch.save(torch.from_numpy(images), directory + "/images.pt")
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pipeline_makes_the_same_images_in_a_new_process(
    dtype: str, dense_dirs: dict[str, Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    stock = DiTPipeline(DiTTransformer2DModel.from_pretrained(dense_dirs["dit"]), vae, DDIMScheduler())
    stock.register_modules()
    stock.save_pretrained(tmp_path / "stock")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "stock", dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    # Class 1000 is DiT's null class; the tiny embedding has none, so guidance is left at its class range.
    pipe.transformer.config.num_embeds_ada_norm  # noqa: B018
    recipe = mixed_recipe(pipe.transformer, ActivationSpec(bits=8))
    assert apply_recipe(pipe, recipe) is pipe
    pipe.save_pretrained(tmp_path / "small")
    y = run(pipe.transformer)
    script = FRESH.replace(
        'images = pipe([1, 2], generator=generator, num_inference_steps=2, output_type="np").images\n'
        'torch.save(torch.from_numpy(images), directory + "/images.pt")',
        "x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)\n"
        "with torch.no_grad():\n"
        "    y = pipe.transformer(x, timestep=torch.tensor([10, 500]), class_labels=torch.tensor([1, 2])).sample\n"
        'torch.save(y, directory + "/images.pt")',
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "small"), dtype], check=True, timeout=300)
    assert torch.equal(torch.load(tmp_path / "small/images.pt", weights_only=True), y)
