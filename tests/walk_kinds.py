"""Tiny random pipelines of the kinds that are walked the whole way, each with its own scheduler and a protocol."""

from collections.abc import Callable
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from quantdm import Protocol
from tests.pipeline_kinds import KINDS as FURTHER
from tests.pipeline_kinds import PROMPTS, SCENES
from tests.tiny_parts import WIDTH, decoder, encoder, network, tokenizer

UNET = {
    "sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 4,
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": WIDTH,
}  # fmt: skip
XL = {**UNET, "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True}
DIT = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "in_channels": 4, "patch_size": 2}
WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "num_layers": 1,
    "out_channels": 16, "text_dim": WIDTH, "freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32,
}  # fmt: skip
FLOW = "FlowMatchEulerDiscreteScheduler"


def scheduler(cls: str, **settings: Any) -> Any:
    """Return a scheduler of diffusers."""
    return getattr(diffusers, cls)(**settings)


def sdxl() -> DiffusionPipeline:
    """SDXL: two text encoders, sizes as a condition."""
    settings = {**XL, "cross_attention_dim": 2 * WIDTH, "projection_class_embeddings_input_dim": 6 * 8 + WIDTH}
    return diffusers.StableDiffusionXLPipeline(
        vae=decoder("kl"), text_encoder=encoder("clip"), text_encoder_2=encoder("clip-projection"),
        tokenizer=tokenizer("clip"), tokenizer_2=tokenizer("clip"), unet=network("UNet2DConditionModel", settings),
        scheduler=scheduler("EulerDiscreteScheduler", beta_schedule="scaled_linear"), add_watermarker=False,
    )  # fmt: skip


def sdxl_refiner() -> DiffusionPipeline:
    """The refiner of SDXL: it goes on with a picture, and has the second text encoder alone."""
    settings = {**XL, "projection_class_embeddings_input_dim": 5 * 8 + WIDTH}
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=decoder("kl"), text_encoder=None, text_encoder_2=encoder("clip-projection"), tokenizer=None,
        tokenizer_2=tokenizer("clip"), unet=network("UNet2DConditionModel", settings), add_watermarker=False,
        scheduler=scheduler("EulerDiscreteScheduler", beta_schedule="scaled_linear"), requires_aesthetics_score=True,
    )  # pyright: ignore[reportArgumentType] # fmt: skip


def sd3() -> DiffusionPipeline:
    """Stable Diffusion 3: three text encoders, flow matching."""
    settings = {
        **DIT, "sample_size": 16, "out_channels": 4, "joint_attention_dim": 2 * WIDTH, "caption_projection_dim": 24,
        "pooled_projection_dim": 2 * WIDTH, "qk_norm": "rms_norm", "dual_attention_layers": (0,),
        "pos_embed_max_size": 16,
    }  # fmt: skip
    wide = encoder("t5", d_model=2 * WIDTH)
    return diffusers.StableDiffusion3Pipeline(
        transformer=network("SD3Transformer2DModel", settings), scheduler=scheduler(FLOW, shift=3.0),
        vae=decoder("kl-shifted"), text_encoder=encoder("clip-projection"), tokenizer=tokenizer("clip"),
        text_encoder_2=encoder("clip-projection"), tokenizer_2=tokenizer("clip"), text_encoder_3=wide,
        tokenizer_3=tokenizer("t5"),
    )  # fmt: skip


def flux() -> DiffusionPipeline:
    """FLUX: packed latents, a guidance that the network is told."""
    settings = {
        "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH,
        "axes_dims_rope": (4, 4, 8), "guidance_embeds": True,
    }  # fmt: skip
    return diffusers.FluxPipeline(
        transformer=network("FluxTransformer2DModel", settings), scheduler=scheduler(FLOW, use_dynamic_shifting=True),
        vae=decoder("kl-shifted"), text_encoder=encoder("clip"), tokenizer=tokenizer("clip"),
        text_encoder_2=encoder("t5"), tokenizer_2=tokenizer("t5"),
    )  # fmt: skip


def pixart_sigma() -> DiffusionPipeline:
    """PixArt-Sigma."""
    settings = {
        **DIT, "sample_size": 16, "out_channels": 8, "cross_attention_dim": 24, "caption_channels": WIDTH,
        "use_additional_conditions": False,
    }  # fmt: skip
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer("t5"), text_encoder=encoder("t5"), vae=decoder("kl"),
        transformer=network("PixArtTransformer2DModel", settings), scheduler=scheduler("DPMSolverMultistepScheduler"),
    )  # fmt: skip


def hunyuan_dit() -> DiffusionPipeline:
    """Hunyuan-DiT: long skips in a transformer, two kinds of text."""
    settings = {
        **DIT, "sample_size": 8, "num_layers": 4, "attention_head_dim": 8, "hidden_size": 16, "mlp_ratio": 2.0,
        "cross_attention_dim": WIDTH, "cross_attention_dim_t5": WIDTH, "pooled_projection_dim": 16,
        "learn_sigma": True, "activation_fn": "gelu-approximate",
    }  # fmt: skip
    return diffusers.HunyuanDiTPipeline(
        vae=decoder("kl-8"), text_encoder=encoder("bert"), tokenizer=tokenizer("bert"),
        transformer=network("HunyuanDiT2DModel", settings), safety_checker=None, feature_extractor=None,
        scheduler=scheduler("DDPMScheduler", prediction_type="v_prediction"), requires_safety_checker=False,
        text_encoder_2=encoder("t5"), tokenizer_2=tokenizer("t5", length=256),
    )  # pyright: ignore[reportArgumentType] # fmt: skip


def sana() -> DiffusionPipeline:
    """Sana: linear attention, a decoder of its own, a language model."""
    settings = {
        **DIT, "patch_size": 1, "sample_size": 16, "out_channels": 4, "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": WIDTH,
    }  # fmt: skip
    return diffusers.SanaPipeline(
        tokenizer=tokenizer("gemma"), text_encoder=encoder("gemma2"), vae=decoder("dc"),
        transformer=network("SanaTransformer2DModel", settings),
        scheduler=scheduler(
            "DPMSolverMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )  # fmt: skip


def lumina2() -> DiffusionPipeline:
    """Lumina-Image 2."""
    settings = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2,
        "num_attention_heads": 3, "num_kv_heads": 3, "multiple_of": 16, "axes_dim_rope": (4, 2, 2),
        "num_refiner_layers": 1, "cap_feat_dim": WIDTH,
    }  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=network("Lumina2Transformer2DModel", settings), scheduler=scheduler(FLOW, shift=6.0),
        vae=decoder("kl-8"), text_encoder=encoder("gemma2"), tokenizer=tokenizer("gemma"),
    )  # fmt: skip


def qwen_image() -> DiffusionPipeline:
    """Qwen-Image: a vision language model reads the prompt."""
    settings = {
        "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": WIDTH, "axes_dims_rope": (8, 4, 4),
    }  # fmt: skip
    return diffusers.QwenImagePipeline(
        scheduler=scheduler(FLOW, use_dynamic_shifting=True), vae=decoder("qwen"), text_encoder=encoder("qwen"),
        tokenizer=tokenizer("qwen"), transformer=network("QwenImageTransformer2DModel", settings),
    )  # fmt: skip


def wan() -> DiffusionPipeline:
    """Wan 2.2: one transformer for the high noise levels, another for the low ones."""
    return diffusers.WanPipeline(
        tokenizer=tokenizer("t5"), text_encoder=encoder("umt5"), vae=decoder("wan"), boundary_ratio=0.9,
        transformer=network("WanTransformer3DModel", WAN),
        transformer_2=network("WanTransformer3DModel", WAN | {"num_layers": 2}),
        scheduler=scheduler(
            "UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )  # fmt: skip


def cogvideox() -> DiffusionPipeline:
    """CogVideoX."""
    settings = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
        "text_embed_dim": WIDTH, "num_layers": 2, "sample_width": 2, "sample_height": 2, "sample_frames": 9,
        "patch_size": 2, "max_text_seq_length": 16,
    }  # fmt: skip
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer("t5"), text_encoder=encoder("t5"), vae=decoder("cog"),
        transformer=network("CogVideoXTransformer3DModel", settings), scheduler=scheduler("CogVideoXDDIMScheduler"),
    )  # fmt: skip


def ltx() -> DiffusionPipeline:
    """LTX-Video."""
    settings = {
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
        "cross_attention_dim": 32, "caption_channels": WIDTH,
    }  # fmt: skip
    return diffusers.LTXPipeline(
        scheduler=scheduler(FLOW, use_dynamic_shifting=True), vae=decoder("ltx"), text_encoder=encoder("t5"),
        tokenizer=tokenizer("t5"), transformer=network("LTXVideoTransformer3DModel", settings),
    )  # fmt: skip


def lcm() -> DiffusionPipeline:
    """A latent consistency model: the network is told the guidance scale."""
    return diffusers.LatentConsistencyModelPipeline(
        vae=decoder("kl"), text_encoder=encoder("clip"), tokenizer=tokenizer("clip"),
        unet=network("UNet2DConditionModel", {**UNET, "time_cond_proj_dim": 16}), scheduler=scheduler("LCMScheduler"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # pyright: ignore[reportArgumentType] # fmt: skip


PLAIN = {"use_resolution_binning": False}  # bins are of 512 pixels and more
VIDEO = {**PROMPTS, "call": {"num_frames": 9, "height": 32, "width": 32}}
# Kind -> what makes its pipeline, and what its protocol says beside version, features and steps.
KINDS: dict[str, tuple[Callable[[], DiffusionPipeline], dict[str, Any]]] = {
    "sdxl": (sdxl, {**PROMPTS, "call": {"negative_prompt": "blurry"}}),
    "sdxl-refiner": (sdxl_refiner, {**PROMPTS, "call": {"image": SCENES, "strength": 1.0}, "resolution": 32}),
    "sd3": (sd3, {**PROMPTS, "guidance_scale": 4.0, "call": {"max_sequence_length": 16}}),
    "flux": (flux, {**PROMPTS, "guidance_scale": 3.5, "resolution": 32, "call": {"max_sequence_length": 16}}),
    "pixart-sigma": (pixart_sigma, {**PROMPTS, "call": {**PLAIN, "max_sequence_length": 16}}),
    "hunyuan-dit": (hunyuan_dit, {**PROMPTS, "call": PLAIN, "resolution": 64}),
    "sana": (sana, {**PROMPTS, "resolution": 32, "call": {**PLAIN, "complex_human_instruction": {"value": []}}}),
    "lumina2": (lumina2, {**PROMPTS, "resolution": 64}),
    "qwen-image": (qwen_image, {**PROMPTS, "call": {"true_cfg_scale": 4.0, "negative_prompt": " "}, "resolution": 32}),
    "wan-2.2": (wan, {**VIDEO, "call": {**VIDEO["call"], "num_frames": 5, "max_sequence_length": 16}}),
    "cogvideox": (
        cogvideox,
        {**PROMPTS, "call": {"num_frames": 9, "height": 16, "width": 16, "max_sequence_length": 16}},
    ),
    "ltx-video": (ltx, {**VIDEO, "call": {**VIDEO["call"], "max_sequence_length": 16}}),
    "lcm": (lcm, {**PROMPTS, "guidance_scale": 8.0}),
    "animatediff": FURTHER["video"],
    **{name: FURTHER[name] for name in ("ddpm", "consistency", "image-to-image", "inpainting", "controlnet")},
    "class-conditional": FURTHER["class-conditional"],
}  # fmt: skip


def protocol_of(kind: str) -> Protocol:
    """Return the protocol of a kind: two steps, features that need no weights."""
    return Protocol(**{"version": 2, "steps": 2, "features": "pyramid", **KINDS[kind][1]})


def make(kind: str) -> DiffusionPipeline:
    """Return a tiny random pipeline of that kind."""
    pipe = KINDS[kind][0]()
    pipe.set_progress_bar_config(disable=True)
    return pipe
