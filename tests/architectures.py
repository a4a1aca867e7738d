"""Configurations of denoisers, as data: class name and the arguments that differ from its defaults."""

PUBLIC = {
    "pixart-xl-2": (
        "PixArtTransformer2DModel",
        {"sample_size": 64, "caption_channels": 4096, "use_additional_conditions": False},
    ),
    "hunyuan-dit": (
        "HunyuanDiT2DModel",
        {
            "activation_fn": "gelu-approximate", "attention_head_dim": 88, "num_attention_heads": 16, "num_layers": 40,
            "cross_attention_dim": 1024, "cross_attention_dim_t5": 2048, "text_len": 77, "text_len_t5": 256,
            "hidden_size": 1408, "in_channels": 4, "learn_sigma": True, "mlp_ratio": 4.3637, "patch_size": 2,
            "pooled_projection_dim": 1024, "sample_size": 128,
        },
    ),
    "sdxl": (
        "UNet2DConditionModel",
        {
            "sample_size": 128, "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": [1, 2, 10],
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        },
    ),
    "sd-1.5": ("UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}),
    "dit-xl-2": (
        "DiTTransformer2DModel",
        {
            "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "patch_size": 2, "in_channels": 4,
            "out_channels": 8, "sample_size": 32,
        },
    ),
    "sd-3.5-medium": (
        "SD3Transformer2DModel",
        {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
            "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
            "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
        },
    ),
    "flux.1-dev": (
        "FluxTransformer2DModel",
        {
            "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
            "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
        },
    ),
}  # fmt: skip
# The embedded reference pipelines' denoisers.
DIGITS = {
    "digits-dit": (
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 5, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "num_layers": 6,
            "sample_size": 8, "patch_size": 2,
        },
    ),
    "digits-flow": (
        "SD3Transformer2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 5,
            "attention_head_dim": 32, "num_attention_heads": 5, "joint_attention_dim": 160,
            "caption_projection_dim": 160, "pooled_projection_dim": 160, "pos_embed_max_size": 4,
        },
    ),
    "digits-sd": (
        "UNet2DConditionModel",
        {
            "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (64, 160),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 1, "norm_num_groups": 16,
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 160, "attention_head_dim": 5,
        },
    ),
}  # fmt: skip
