"""What a denoiser's arguments look like, as data: argument name -> shapes that follow from the configuration.

A shape is text: dtype, then sizes ("float B T text"). Sizes are numbers, letters, names of SIZES or fields of the
configuration, joined from left to right by * + - / ("channels-4"); "#field" is the length of a list. The dtypes zeros,
ones and range are integers of those values, true is boolean; "=F" is a plain number. Lists, tuples and dicts hold
several. What names a field that the configuration lacks is left out; so is what stands after "?field" where that field
is off, or after "!field" where it is on.

Letters: B batch, T text tokens; F H W frames, height and width of latents; h w the grid of N packed image tokens.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Repeat:
    """A list of `count` equal items."""

    count: str
    item: Any


# name -> fields of the configuration: the first that is there and not None ("field.1": the second entry of a list)
SIZES: dict[str, tuple[str, ...]] = {
    "channels": (
        "in_channels", "in_visual_dim", "in_dim", "latent_dim", "io_channels", "embedding_dim", "latent_channel",
        "input_dims",
    ),
    "text": (
        "caption_channels", "joint_attention_dim", "text_embed_dim", "text_dim", "cap_feat_dim", "context_in_dim",
        "text_in_dim", "in_text_dim", "text_hidden_dim", "llm_features_dim", "encoder_hidden_size", "dit_text_dim",
        "cond_token_dim", "cross_attention_input_dim", "encoder_hid_dim", "cross_attention_dim", "condition_dim",
    ),
    "pooled": ("pooled_projection_dim", "in_text_dim2", "text_emb_dim", "cond_embed_dim"),
    "axes": ("#axes_dims_rope", "#axes_dim_rope", "#axes_dims", "#rope_axes_dim"),
    "patch": ("patch_size.-1",),
    "T": ("text_len", "max_text_seq_length", "num_embeddings"),
    "H": ("sample_height", "sample_size"),
    "W": ("sample_width", "sample_size.-1"),
}  # fmt: skip
# What the letters stand for where the configuration says nothing. No batch of one, which would be broadcast where the
# model means something else; no size that is a usual number of channels.
LETTERS = {"B": 2, "T": 12, "F": 4, "H": 48, "W": 48, "N": 16, "h": 4, "w": 4}

IMAGE, VIDEO, FRAMES_FIRST = "float B channels H W", "float B channels F H W", "float B F channels H W"
PACKED, SERIES, VECTOR = "float B N channels", "float B channels W", "float B channels"
LIST = Repeat("B", "float channels 1 H W")
LATENT_ARGUMENTS = ("sample", "hidden_states", "x")
# Kind of the first layer that reads the latents' channels -> what the latents may be, likeliest first.
LATENTS: dict[str, tuple[Any, ...]] = {
    "linear": (PACKED, IMAGE, VIDEO, SERIES, VECTOR, LIST),
    "conv1d": (SERIES, PACKED),
    "conv2d": (IMAGE, FRAMES_FIRST, VIDEO),
    "conv3d": (VIDEO, FRAMES_FIRST, IMAGE, LIST),
    "": (IMAGE, VIDEO, PACKED, FRAMES_FIRST, SERIES, LIST),
}
MASK = (None, "ones B T", "true B T")
# Argument -> its shapes, likeliest first; None: left out, where the argument has a default (else that comes last).
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "return_dict": (False,),
    "timestep": ("float B",),
    "timesteps": ("float B",),
    "encoder_hidden_states": ("float B T text",),
    "timestep_cond": ("float B time_cond_proj_dim",),
    "pooled_projections": ("float B pooled",),
    "guidance": ("?guidance_embeds float B", "?guidance_embed float B"),
    "img_ids": ("float N axes", "float N 3", "float B N axes"),
    "txt_ids": ("float T axes", "float T 3", "float B T axes"),
    "encoder_attention_mask": MASK,
    "attention_mask": MASK,
    "class_labels": (
        "?projection_class_embeddings_input_dim float B projection_class_embeddings_input_dim", "?num_class_embeds zeros B", "?num_embeds_ada_norm zeros B", "float B",
    ),
    "added_cond_kwargs": (
        {
            "text_embeds": "float B projection_class_embeddings_input_dim-addition_time_embed_dim*6",
            "time_ids": "float B 6",
            "resolution": "float B 2",
            "aspect_ratio": "float B 1",
        },
    ),
}  # fmt: skip
