"""Tiny real models and mixed recipes that the tests of the hub share."""

from itertools import cycle
from pathlib import Path

import torch
from diffusers import (
    AutoModel,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from quantdm.denoisers.inventory import list_layers
from quantdm.hub import apply_recipe, register
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
    """Call a denoiser on fixed inputs in its own dtype, where it is."""
    generator = torch.Generator().manual_seed(1)
    device = torch.device("cpu") if model.device.type == "meta" else model.device  # offloaded: hooks bring inputs along
    x = torch.randn(2, 4, 8, 8, generator=generator).to(device, model.dtype)
    text = torch.randn(2, 5, 12, generator=generator).to(device, model.dtype)
    time, labels = torch.tensor([[10, 500], [1, 2]], device=device)
    kind = type(getattr(model, "_orig_mod", model))  # a compiled model hides its class
    if kind is DiTTransformer2DModel:
        return model(x, timestep=time, class_labels=labels, return_dict=False)[0]
    extra = {"added_cond_kwargs": {}} if kind is PixArtTransformer2DModel else {}
    return model(x, timestep=time, encoder_hidden_states=text, return_dict=False, **extra)[0]


def load(directory: Path, **options: object) -> nn.Module:
    """Open a denoiser without naming its class."""
    return AutoModel.from_pretrained(str(directory), **options)


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


def save_dense(directory: Path) -> dict[str, Path]:
    """Save the dense tiny models: a bf16 model is one that from_pretrained opens in bf16."""
    register()
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(directory / name)
    return {name: directory / name for name in MODELS}


def save_export(dense: Path, directory: Path) -> Path:
    """Save a model with the mixed recipe."""
    model = load(dense)
    apply_recipe(model, mixed_recipe(model), insist=True).save_pretrained(directory)
    return directory
