"""Tiny real instances of many model classes, as data, and inputs for any of them that follow from its configuration.

python -m tests.family_models DIRECTORY    # open every export below it and write what it answers
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoModel
from diffusers.utils.logging import disable_progress_bar
from safetensors.torch import save_file
from torch import nn

import quantdm  # noqa: F401 (registers the plug-in)
from quantdm.denoisers.example_inputs import infer_inputs

# Class name and the arguments that make it small; a dict under "config" is a transformers configuration.
UNET = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "cross_attention_dim": 12, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 4,
}  # fmt: skip
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2}
MMDIT = {
    "attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 1, "num_single_layers": 1, "in_channels": 4,
    "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
DENOISERS: dict[str, tuple[str, dict[str, Any]]] = {
    "unet2d": (
        "UNet2DModel",
        {
            "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
            "attention_head_dim": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
    ),
    "sd-1.5": ("UNet2DConditionModel", UNET),
    "sdxl": (
        "UNet2DConditionModel",
        {
            **UNET, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": [2, 4],
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": [1, 2],
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True,
            "projection_class_embeddings_input_dim": 60,
        },
    ),
    "dit": ("DiTTransformer2DModel", {**DIT, "in_channels": 4, "out_channels": 8}),
    "pixart": (
        "PixArtTransformer2DModel",
        {
            **DIT, "in_channels": 4, "out_channels": 8, "attention_head_dim": 12, "cross_attention_dim": 24,
            "caption_channels": 12, "use_additional_conditions": True,
        },
    ),
    "hunyuan-dit": (
        "HunyuanDiT2DModel",
        {
            **DIT, "num_layers": 4, "in_channels": 4, "hidden_size": 16, "mlp_ratio": 2.0, "cross_attention_dim": 12,
            "cross_attention_dim_t5": 16, "pooled_projection_dim": 16, "text_len": 5, "text_len_t5": 6,
            "learn_sigma": True, "activation_fn": "gelu-approximate",
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            **DIT, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 12, "caption_projection_dim": 16,
            "pooled_projection_dim": 20, "qk_norm": "rms_norm", "dual_attention_layers": (0,), "pos_embed_max_size": 8,
        },
    ),
    "flux": ("FluxTransformer2DModel", {**MMDIT, "pooled_projection_dim": 8, "guidance_embeds": True}),
    "sana": (
        "SanaTransformer2DModel",
        {
            **DIT, "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 12,
        },
    ),
    "aura-flow": (
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
            "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16,
            "out_channels": 4, "pos_embed_max_size": 16,
        },
    ),
    "cogview4": (
        "CogView4Transformer2DModel",
        {
            "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
            "out_channels": 4, "text_embed_dim": 12, "time_embed_dim": 8, "condition_dim": 4,
        },
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        {
            **MMDIT, "patch_size": 1, "joint_attention_dim": 32, "approximator_num_channels": 8,
            "approximator_hidden_dim": 16, "approximator_layers": 1,
        },
    ),
    "wan": (
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
            "out_channels": 4, "text_dim": 12, "freq_dim": 16, "ffn_dim": 24, "num_layers": 2, "rope_max_seq_len": 32,
        },
    ),
    "hunyuan-video": (
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
            "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1,
            "guidance_embeds": True, "text_embed_dim": 12, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
        },
    ),
    "unet1d": (
        "UNet1DModel",
        {
            "block_out_channels": (8, 8, 16, 16), "in_channels": 14, "out_channels": 14, "use_timestep_embedding": True,
            "time_embedding_type": "positional", "out_block_type": "OutConv1DBlock", "flip_sin_to_cos": False,
            "freq_shift": 1.0, "mid_block_type": "MidResTemporalBlock1D", "act_fn": "swish", "sample_size": 16,
            "down_block_types": ("DownResnetBlock1D",) * 4, "up_block_types": ("UpResnetBlock1D",) * 3,
        },
    ),
}  # fmt: skip
CLIP = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16, "projection_dim": 16, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TEXT_ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIPTextModel", CLIP),
    "clip-projection": ("CLIPTextModelWithProjection", CLIP),
    "t5": (
        "T5EncoderModel",
        {
            "vocab_size": 50, "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16,
            "feed_forward_proj": "gated-gelu",
        },
    ),
}  # fmt: skip
FAMILIES = DENOISERS | TEXT_ENCODERS
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make(name: str) -> nn.Module:
    """Build a family's tiny model with random weights, none of them zero."""
    cls, config = FAMILIES[name]
    torch.manual_seed(0)
    if name in DENOISERS:
        model = getattr(diffusers, cls)(**config)
    else:
        model = getattr(transformers, cls)
        model = model(model.config_class(**config))
    for parameter in model.parameters():  # a projection that starts at zero would hide what comes before it
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def open_(directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Open a saved model of either library, of the class that its configuration states."""
    config = json.loads((directory / "config.json").read_text())
    if "architectures" in config:
        return getattr(transformers, config["architectures"][0]).from_pretrained(directory, dtype=dtype)
    return AutoModel.from_pretrained(str(directory), torch_dtype=dtype)


def _filled(name: str, value: Any, dtype: torch.dtype, generator: torch.Generator) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return torch.rand(value.shape, generator=generator).to(dtype)
    if isinstance(value, torch.Tensor):  # a mask lets everything through, a label is one that every table has
        return torch.full(value.shape, int("mask" in name), dtype=value.dtype)
    if isinstance(value, dict):
        return {key: _filled(key, item, dtype, generator) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(name, item, dtype, generator) for item in value)
    return value


def inputs_of(model: nn.Module) -> dict[str, Any]:
    """Return the arguments of one call, the same in every process."""
    if isinstance(model, transformers.PreTrainedModel):
        return {"input_ids": torch.arange(3, 13)[None]}
    inputs = infer_inputs(model, model.config)
    return _filled("", inputs, model.dtype, torch.Generator().manual_seed(1))


@torch.no_grad()
def answer(model: nn.Module) -> torch.Tensor:
    """Call a model on its inputs."""
    return model(**inputs_of(model))[0].contiguous()


def exports(root: Path) -> Iterator[tuple[str, Path, torch.dtype]]:
    """Yield key, directory and dtype of the exports below `root` (family/dtype/layout)."""
    for config in sorted(root.glob("*/*/*/config.json")):
        directory = config.parent
        yield str(directory.relative_to(root)), directory, DTYPES[directory.parent.name]


if __name__ == "__main__":
    torch.set_num_threads(1)
    disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    root = Path(sys.argv[1])
    outputs = {key: answer(open_(directory, dtype)) for key, directory, dtype in exports(root)}
    save_file(outputs, root / "answers.safetensors")
