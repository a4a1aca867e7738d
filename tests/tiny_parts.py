"""Tiny random parts of pipelines: tokenizers of single letters, text encoders and decoders, as data."""

import string
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from quantdm import load_pipeline

LETTERS = [*string.ascii_letters, *string.digits, *string.punctuation, "Ġ", "Ċ", "▁"]
WIDTH = 32  # of every text encoder
KL = {
    "latent_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "sample_size": 32,
}  # fmt: skip
# Decoder -> class of diffusers and its arguments.
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "kl": ("AutoencoderKL", KL),
    "kl-shifted": ("AutoencoderKL", {**KL, "shift_factor": 0.06, "scaling_factor": 1.5}),
    "kl-8": (
        "AutoencoderKL",
        {
            **KL, "block_out_channels": (8,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4, "shift_factor": 0.1, "scaling_factor": 0.4,
        },
    ),
    "dc": (
        "AutoencoderDC",
        {
            "latent_channels": 4, "attention_head_dim": 2, "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8), "encoder_qkv_multiscales": ((), (5,)),
            "decoder_qkv_multiscales": ((), (5,)), "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1), "downsample_block_type": "conv", "upsample_block_type": "interpolate",
            "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu", "scaling_factor": 0.4,
        },
    ),
    "qwen": (
        "AutoencoderKLQwenImage",
        {
            "base_dim": 24, "z_dim": 4, "dim_mult": [1, 2, 4], "num_res_blocks": 1,
            "temperal_downsample": [False, True], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
        },
    ),
    "wan": ("AutoencoderKLWan", {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}),
    "cog": (
        "AutoencoderKLCogVideoX",
        {
            "down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4,
            "block_out_channels": (8,) * 4, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2,
        },
    ),
    "ltx": (
        "AutoencoderKLLTXVideo",
        {
            "latent_channels": 8, "block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4,
            "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5,
            "spatio_temporal_scaling": (True, True, False, False),
            "decoder_spatio_temporal_scaling": (True, True, False, False), "decoder_inject_noise": (False,) * 5,
            "upsample_residual": (False,) * 4, "upsample_factor": (1,) * 4, "timestep_conditioning": False,
            "patch_size": 1, "patch_size_t": 1,
        },
    ),
}  # fmt: skip
NARROW = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
GEMMA = {**NARROW, "head_dim": 16, "num_key_value_heads": 2, "vocab_size": 128}
T5 = {"vocab_size": 128, "d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
CLIP = {**NARROW, "vocab_size": 600, "projection_dim": WIDTH, "max_position_embeddings": 77}
QWEN = {
    "text_config": {
        **NARROW, "num_key_value_heads": 2, "vocab_size": 128, "rope_theta": 1e6,
        "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
    },
    "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH},
}  # fmt: skip
# Text encoder -> class of transformers and its configuration.
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIPTextModel", CLIP),
    "clip-projection": ("CLIPTextModelWithProjection", CLIP),
    "t5": ("T5EncoderModel", {**T5, "feed_forward_proj": "gated-gelu"}),
    "umt5": ("UMT5EncoderModel", T5),
    "bert": ("BertModel", {**NARROW, "vocab_size": 128, "max_position_embeddings": 77}),
    "gemma2": ("Gemma2Model", GEMMA),
    "qwen": ("Qwen2_5_VLForConditionalGeneration", QWEN),
}


def network(cls: str, settings: dict[str, Any]) -> Any:
    """Return a random network of diffusers; what starts at zero has something to say."""
    torch.manual_seed(0)
    model = getattr(diffusers, cls)(**settings).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def decoder(name: str, **changed: Any) -> Any:
    """Return a tiny random decoder by its name here."""
    cls, settings = DECODERS[name]
    return network(cls, settings | changed)


def encoder(name: str, **changed: Any) -> Any:
    """Return a tiny random text encoder by its name here."""
    cls, settings = ENCODERS[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)
    return model(model.config_class(**(settings | changed))).eval()


def tokenizer(name: str, *, length: int = 77) -> Any:
    """Return a tokenizer of single letters by the kind of its text encoder, with room for `length` tokens."""
    if name == "clip":
        return load_pipeline("digits-sd").tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    if name == "t5":
        vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in LETTERS)]
        return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=length)
    if name == "bert":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]
        vocab = {word: i for i, word in enumerate([*words, *(f"##{c}" for c in string.ascii_lowercase)])}
        return transformers.BertTokenizer(vocab=vocab, model_max_length=length)
    special = {"gemma": ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], "qwen": ["<|endoftext|>"]}[name]
    vocab = {word: i for i, word in enumerate([*special, *LETTERS])}
    cls = {"gemma": transformers.GemmaTokenizer, "qwen": transformers.Qwen2Tokenizer}[name]
    return cls(vocab=vocab, merges=[], model_max_length=length)
