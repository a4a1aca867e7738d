"""Public configurations of big denoisers, as data: class name and the arguments that differ from its defaults."""

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
}  # fmt: skip
