"""Protocols of two papers as data: what they sample, how many images, and the published numbers to compare with."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Paper:
    """One table of a paper."""

    title: str  # which paper, which model
    pipeline: str  # the class that its weights are opened with
    argument: str  # prompt or class_labels
    values: str  # what the user must give: where captions or classes come from
    labels: int | None  # images per configuration for the labels of the search
    images: int  # images of the tables
    steps: tuple[int, ...]  # one measurement each
    guidance: float
    resolution: int
    call: dict[str, Any]
    bits: float  # bits of the paper's recipe
    recipe: str | None  # shipped starting point
    rows: tuple[str, ...]  # the published row
    denoiser: tuple[str, dict[str, Any]]  # class and configuration, for the expected time
    settings: str = "steps and guidance: the pipeline's defaults (DiT: 250 steps, guidance 1.5)"


QUA2 = "Qua2SeDiMo (AAAI 2025, arXiv 2412.14628)"
PTQD = "PTQD (NeurIPS 2023, arXiv 2305.10657)"
COCO = "captions of COCO 2014 validation, one per line"
PIXART = {"sample_size": 64, "caption_channels": 4096, "use_additional_conditions": False}
SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816, "use_linear_projection": True,
}  # fmt: skip
HUNYUAN = {
    "activation_fn": "gelu-approximate", "attention_head_dim": 88, "num_attention_heads": 16, "num_layers": 40,
    "cross_attention_dim": 1024, "cross_attention_dim_t5": 2048, "text_len": 77, "text_len_t5": 256,
    "hidden_size": 1408, "in_channels": 4, "learn_sigma": True, "mlp_ratio": 4.3637, "patch_size": 2,
    "pooled_projection_dim": 1024, "sample_size": 128,
}  # fmt: skip
DIT = {
    "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "patch_size": 2, "in_channels": 4,
    "out_channels": 8, "sample_size": 32,
}  # fmt: skip
LDM4 = {
    "sample_size": 64, "in_channels": 3, "out_channels": 3, "block_out_channels": (192, 384, 576, 960),
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3), "layers_per_block": 2,
    "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"), "cross_attention_dim": 512,
    "attention_head_dim": (6, 12, 18, 30),
}  # fmt: skip

PAPERS: dict[str, Paper] = {
    "pixart-alpha": Paper(
        f"{QUA2}, PixArt-alpha 512", "PixArtAlphaPipeline", "prompt", COCO, 1000, 10_000, (20,), 4.5, 512,
        {"use_resolution_binning": False}, 3.4, "pixart-alpha-3.4bit",
        (
            "FID-10k to COCO: full precision 34.05, W3.4A16 35.51",
            "uniform: UAQ4 32.64, k-means 4 33.03, Q-Diffusion 4 39.95, UAQ3 77.04, k-means 3 80.70",
            "CLIP score (x 100): full precision 31.02, W4A16 30.56, W3.4A16 29.19, W4A6 29.50, W3.4A6 28.98; W4A6 of "
            "Q-Diffusion 28.65, TFMQ-DM 25.46, ViDiT-Q 28.52",
        ),
        ("PixArtTransformer2DModel", PIXART),
    ),
    "pixart-sigma": Paper(
        f"{QUA2}, PixArt-Sigma 1024", "PixArtSigmaPipeline", "prompt", COCO, 1000, 10_000, (20,), 4.5, 1024,
        {"use_resolution_binning": False}, 3.9, "pixart-sigma-3.9bit",
        (
            "FID-10k to COCO: full precision 36.94, W3.9A16 30.34",
            "uniform: UAQ4 above 100, k-means 4 38.13, Q-Diffusion 4 43.09, every 3-bit one above 100",
        ),
        ("PixArtTransformer2DModel", PIXART | {"sample_size": 128}),
    ),
    "hunyuan-dit": Paper(
        f"{QUA2}, Hunyuan-DiT", "HunyuanDiTPipeline", "prompt", COCO, 1000, 10_000, (50,), 5.0, 1024,
        {"use_resolution_binning": False}, 3.65, "hunyuan-dit-3.65bit",
        ("FID-10k to COCO: full precision 41.92, W3.65A16 41.97",), ("HunyuanDiT2DModel", HUNYUAN),
    ),
    "sdxl": Paper(
        f"{QUA2}, SDXL base", "StableDiffusionXLPipeline", "prompt", COCO, 1000, 10_000, (50,), 5.0, 1024, {}, 3.7,
        "sdxl-3.7bit", ("3.7 bits per weight; its FID stands in the paper, not in this project's notes",),
        ("UNet2DConditionModel", SDXL),
    ),
    "dit": Paper(
        f"{QUA2}, DiT-XL/2 256", "DiTPipeline", "class_labels", "classes of ImageNet, 0 to 999 in turn", 1000, 50_000,
        (250,), 1.5, 256, {}, 3.5, "dit-xl-2-3.5bit",
        ("3.5 bits per weight; its FID-50k stands in the paper, not in this project's notes",),
        ("DiTTransformer2DModel", DIT),
    ),
    "ldm-4": Paper(
        f"{PTQD}, LDM-4 on ImageNet 256", "ClassLDMPipeline", "class_labels", "classes of ImageNet, 0 to 999 in turn",
        None, 50_000, (250, 20), 3.0, 256, {}, 4.0, None,
        (
            "250 steps, eta 1: FID-50k full precision 5.05, W4A8 Q-Diffusion 5.37, W4A8 PTQD 5.11",
            "bits mixed over steps, without -> with the correction: 9.97 -> 6.44; 20 steps, eta 0: 116.61 -> 7.75",
        ),
        ("UNet2DConditionModel", LDM4), settings="steps and eta: the paper's; guidance: the usual one of this model",
    ),
}  # fmt: skip
ETA = {250: 1.0, 20: 0.0}  # of LDM-4
