"""What a denoiser's arguments look like, as data: argument name -> shapes that follow from the configuration.

A shape is text: what fills it, then sizes ("float B T text"). Sizes are numbers, letters, names of SIZES or fields of
the configuration, joined from left to right by * + - / ("channels-4"); "#field" is the length of a list. "=F" is a
plain number, "'word" a plain word; lists, tuples and dicts hold several. What names a field that the configuration
lacks is left out; so is what stands after "?field" where that field is off, or after "@field" where there is none.

Letters: B batch, T text tokens; F H W frames, height and width of latents; h w the grid of N packed image tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Repeat:
    """A list of `count` equal items."""

    count: str
    item: Any


@dataclass(frozen=True)
class New:
    """A new object of the class that the argument is annotated with, made from fields of the configuration."""


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
    "patch": ("patch_size.last",),
    "F": ("video_length",),
    "T": ("text_len", "max_text_seq_length", "num_embeddings"),
    "H": ("sample_height", "sample_size"),
    "W": ("sample_width", "sample_size.last"),
}  # fmt: skip
# What the letters stand for where the configuration says nothing. No batch of one, which would be broadcast where the
# model means something else; no size that is a usual number of channels.
LETTERS = {"channels": 4, "B": 2, "T": 12, "F": 6, "H": 48, "W": 48, "N": 16, "h": 4, "w": 4}

IMAGE, VIDEO, FRAMES_FIRST = "float B channels H W", "float B channels F H W", "float B F channels H W"
PACKED, SERIES, VECTOR, LAST = "float B N channels", "float B channels W", "float B channels", "float B F H W channels"
PATCHES = "float B N channels 1 patch patch"
OTHERS = (
    Repeat("B", "float out_dim F H W"),
    "float B F H W channels*2+1",  # with a condition and its mask
    "float B N channels*patch*patch",
    "float B N audio_acoustic_hidden_dim",
    Repeat("B", "float channels 1 H W"),
)
LATENT_ARGUMENTS = ("sample", "hidden_states", "x")


def batch_of(inputs: Mapping[str, Any]) -> int:
    """Return how many samples the latents among a denoiser's inputs are; 1 where they have no such argument."""
    latents = next((inputs[name] for name in LATENT_ARGUMENTS if name in inputs), None)
    return max(len(latents), 1) if isinstance(latents, (list, tuple, Tensor)) else 1


# Kind of the first layer that reads the latents' channels -> what the latents may be, likeliest first.
LATENTS: dict[str, tuple[Any, ...]] = {
    "linear": (PACKED, IMAGE, VIDEO, SERIES, VECTOR, LAST, *OTHERS),
    "conv1d": (SERIES, PACKED, *OTHERS),
    "conv2d": (IMAGE, FRAMES_FIRST, VIDEO, *OTHERS),
    "conv3d": (VIDEO, FRAMES_FIRST, IMAGE, PATCHES, *OTHERS),
    "": (IMAGE, VIDEO, PACKED, FRAMES_FIRST, SERIES, LAST, PATCHES, *OTHERS),
}
TIME = ("float B", "float B F", "float B 1 F")
TEXT = (
    "float B T text", "float B T hidden_size", "float B N text", "float B W text", "float B T embedding_dim",
    "float B T num_text_layers text", "float B*F T text", "float B #injection_layer_ids+1 T text",
    Repeat("B", "float T text"),
)  # fmt: skip
MASK = (None, "ones B T", "true B T")
IMAGE_TOKENS = (
    "some B 1 clip_img_dim", "some B 4 image_dim", "?use_img_emb some B 257 1280", "some B 4 image_embed_dim",
    "some B 4 image_proj_dim",
)  # fmt: skip
CONTROL = (
    "float B conditioning_channels H*8 W*8", "float B N channels+extra_condition_channels", PACKED, IMAGE,
    "float B channels+extra_conditioning_channels H W", "float B conditioning_channels F H W",
    "float B ctrl_conditioning_channels H*8 W*8", Repeat("B", "float B conditioning_channels H*8 W*8"),
)  # fmt: skip
CLEAN, HISTORY = "?has_clean_x_embedder", "?has_multi_term_memory_patch"
# Argument -> its shapes, likeliest first; None: left out, where the argument has a default (else that comes last).
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "return_dict": (False,),
    "kv_cache": (None, New()),
    "kv_cache_mode": (None, "'extract"),
    "cross_attention_kwargs": (None, {}),
    # time
    **dict.fromkeys(("timestep", "timesteps", "t", "timestep_r", "r_timestep", "timestep_ratio"), TIME),
    **dict.fromkeys(("timestep_img", "timestep_text", "decoder_noise_time", "bb_ca_time", "local_latents_time"), TIME),
    "vision_timesteps": ("float N",),
    "target_timestep": ("?flow_map float B",),
    "timestep_cond": ("float B time_cond_proj_dim",),
    "guidance": ("?guidance_embeds float B", "?guidance_embed float B"),
    # text
    "encoder_hidden_states": TEXT,
    "encoder_hidden_states_1": (None, "float B T cross_attention_dim.1"),
    "encoder_hidden_states_2": ("float B T text_embed_2_dim",),
    "encoder_hidden_states_t5": (
        "float B T caption_channels", "float B text_len_t5 cross_attention_dim_t5", "float B T text_embed_dim_t5",
    ),
    "encoder_hidden_states_llama3": (Repeat("llama_layers.last+1", "float B T caption_channels.1"),),
    "text_encoder_layers": (Repeat("num_layers+num_single_layers", "float B T text_encoder_dim"),),
    "audio_encoder_hidden_states": ("float B T text",),
    "encodings_and_masks": ([("float B T d_model", "true B T")],),
    "cap_feats": (Repeat("B", "float T*4 text"),),
    "text_bth": ("float B T text",),
    "text_lens": ("ones B",),
    "prompt_embeds": ("float B num_text_tokens text_dim",),
    **dict.fromkeys(("pooled_projections", "pooled_embeds", "pooled_text_emb"), ("float B pooled",)),
    "clip_text_pooled": ("float B 1 clip_text_pooled_in_channels",),
    **dict.fromkeys(("encoder_attention_mask", "encoder_hidden_states_mask"), MASK),
    "attention_mask": (*MASK, "true B H/patch*W/patch+T+1 H/patch*W/patch+T+1"),
    "encoder_attention_mask_2": ("?text_embed_2_dim true B T",),
    "encoder_mask": ("ones B T",),
    "text_embedding_mask": ("ones B text_len",),
    "text_embedding_mask_t5": ("ones B text_len_t5",),
    # embeddings and labels
    "encoder_hidden_states_image": IMAGE_TOKENS,
    "image_embeds": IMAGE_TOKENS,
    "image_embeddings": ("float B cross_attention_dim",),
    "proj_embedding": ("float B embedding_proj_dim", VECTOR),
    "global_hidden_states": ("float B 1 global_states_input_dim", "float B global_cond_dim"),
    "inputs_embeds": ("float B 8 hidden_size",),
    "class_labels": (
        "?class_embed_type ?projection_class_embeddings_input_dim float B projection_class_embeddings_input_dim",
        "?num_class_embeds zeros B", "?num_embeds_ada_norm zeros B", "?class_embed_type float B",
    ),
    "added_cond_kwargs": (
        {
            "text_embeds": "float B 0-addition_time_embed_dim*6+projection_class_embeddings_input_dim",
            "time_ids": "?addition_time_embed_dim float B 6",
            "image_embeds": "?encoder_hid_dim_type float B encoder_hid_dim",
            "resolution": "@use_additional_conditions float B 2",
            "aspect_ratio": "@use_additional_conditions float B 1",
        },
        {"text_embeds": "float B cross_attention_dim", "image_embeds": "float B cross_attention_dim"},
    ),
    "added_time_ids": ("float B projection_class_embeddings_input_dim/addition_time_embed_dim",),
    "image_meta_size": ("?use_style_cond_and_image_meta_size float B 6",),
    "style": ("?use_style_cond_and_image_meta_size zeros B",),
    **dict.fromkeys(("original_size", "target_size", "crop_coords"), ("float B 2",)),
    "micro_conds": ("float B 5",),
    "fps": ("float B",),
    "prior_token_id": ("zeros B H/patch*W/patch",),
    "prior_token_drop": ("true B H/patch*W/patch",),
    "token_type": ("zeros B N",),
    # images, videos and sound besides the latents
    "controlnet_cond": CONTROL,
    "control_type": ("float B num_control_type",),
    "control_type_idx": (Repeat("B", "=0"),),
    "control_hidden_states": ("float B vace_in_channels F H W",),
    "control_context": (Repeat("B", "float control_in_dim 1 H W"),),
    "conditioning_mask": ("float B 1 F H W",),
    **dict.fromkeys(("latents", "controls_latents"), ("float B latent_channels-2 F H W",)),
    "condition_mask": (None, "float B 1 F H W"),
    "condition_latents": (Repeat("B", "float in_dim-out_dim F H W"),),
    "padding_mask": (None, "float 1 1 H W", "true B N"),
    "image_latents": (VIDEO,),
    "latent_image_embeds": (IMAGE,),
    "context_latents": (None, "float B N channels-audio_acoustic_hidden_dim"),
    "latent_cond": ("?use_latent_condition float B N channels",),
    "local_add_cond": ("float B local_add_cond_dim W",),
    "image_cond_hidden_states": ("float B N cond_in_channels",),
    "pose_hidden_states": ("float B latent_channels F-1 H W",),
    "face_pixel_values": tuple(f"float B 3 F*4-{k} motion_encoder_size motion_encoder_size" for k in (3, 7)),
    "camera_conditions": ("float B F 20",),
    "chunk_plucker": ("float B chunk_plucker_channels F H W",),
    "input_img_latents": (Repeat("B", "float 1 channels patch*2 patch*2"),),
    "input_image_sizes": ({0: [[0, 4]], 1: [[0, 4]]},),
    "audio_hidden_states": ("float B N audio_in_channels", "float B N in_audio_dim"),
    "decoder_input_tokens": (PACKED,),
    "vision_tokens": (["float 1 channels 1 h*latent_patch_size w*latent_patch_size"],),
    "bb_ca": ("float B N 3",),
    "local_latents": (PACKED,),
    "latents_clean": (f"{CLEAN} float B channels 1 H W",),
    "latents_history_2x": (f"{CLEAN} float B channels 2 H W",),
    "latents_history_4x": (f"{CLEAN} float B channels 16 H W",),
    **dict.fromkeys(("latents_history_short", "latents_history_mid"), (f"{HISTORY} float B channels 2 H W",)),
    "latents_history_long": (f"{HISTORY} float B channels 16 H W",),
    # sizes and places
    "num_frames": ("=1", "=F"),
    "height": ("=h",),
    "width": ("=w",),
    "audio_num_frames": ("=N",),
    "seq_len": ("=F*H/patch*W/patch",),
    "und_len": ("=T",),
    "sequence_length": ("=T+N",),
    "chunk_partition": (Repeat("F", "=1"),),
    "img_shapes": (Repeat("B", [("=1", "=h", "=w")]), Repeat("B", ("=1", "=h", "=w"))),
    "shape_list": (Repeat("B", [("=1", "=h", "=w")]),),
    "vision_token_shapes": ([("=1", "=h", "=w")],),
    "offset_grid_sizes": ("ones B 3",),
    "img_ids": ("float N axes", "float N 3", "float B N axes"),
    "txt_ids": ("float T axes", "float T 3", "float B T axes"),
    "image_cond_ids": ("?cond_in_channels float N axes",),
    "img_mask": ("last B T+4 4",),
    "input_ids": ("zeros B H W", "zeros B T", "zeros T"),
    "position_ids": (
        "zeros N 3", "zeros T+N 3", "zeros 3 T+N", "zeros B N 3", "zeros T+N+N 3", "zeros B H/patch*W/patch+T+1",
    ),
    **dict.fromkeys(("segment_ids", "indicator"), ("zeros B N",)),
    **dict.fromkeys(("token_tags", "timestep_indices"), ("zeros T+N+N",)),
    **dict.fromkeys(("text_indices", "text_indexes", "text_rope_pos"), ("range T",)),
    **dict.fromkeys(("video_indices", "audio_indices"), ("range N",)),
    **dict.fromkeys(("vision_sequence_indexes", "vision_mse_loss_indexes"), ("range N",)),
    "vision_noisy_frame_indexes": (["range 1"],),
    "indices_latents": ("range F", "range B F"),
    "indices_latents_clean": (f"{CLEAN} range 1",),
    "indices_latents_history_2x": (f"{CLEAN} range 2",),
    "indices_latents_history_4x": (f"{CLEAN} range 16",),
    **dict.fromkeys(("indices_latents_history_short", "indices_latents_history_mid"), (f"{HISTORY} range B 2",)),
    "indices_latents_history_long": (f"{HISTORY} range B 16",),
    "visual_rope_pos": (("range F", "range H/patch", "range W/patch"),),
    "video_rotary_emb": (("float B N cross_attention_dim", "float B N cross_attention_dim"),),
    "image_rotary_emb": (
        None,
        "complex H/patch W/patch hidden_size/num_attention_heads/2",
        ("float H/patch*W/patch attention_head_dim", "float H/patch*W/patch attention_head_dim"),
    ),
}  # fmt: skip
