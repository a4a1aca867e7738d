"""Roles of layers: what a layer does, named alike in every architecture, so that what was learned of one travels."""

import re

from quantdm.denoisers.inventory import LayerRecord

# Read in this order; the first pattern that occurs in the module path decides. "{where}" is what an attention attends.
_RULES: tuple[tuple[str, str], ...] = (
    (r"down_?sampl", "down"),
    (r"up_?sampl", "up"),
    (r"shortcut|nin_", "shortcut"),
    (r"time_emb_proj", "time-proj"),
    (r"(norm|adaln|ada_norm|modulation|mod)[^.]*\.(linear|lin|proj|1)$|adaln\w*\.linear|\.(linear|lin)$", "modulation"),
    (r"time|guidance_emb", "time-MLP"),
    (r"caption|context_emb|text|encoder_hid|cond|class_emb|label_emb|y_emb|txt_in|cap_emb", "text-MLP"),
    (r"add_q|to_q_add", "{where} q"),
    (r"add_k", "{where} k"),
    (r"add_v", "{where} v"),
    (r"(to_q|q_proj|query|\.q|wq)(\.|$)|qkv", "{where} q"),
    (r"(to_k|k_proj|key|\.k|wk)(\.|$)|to_kv", "{where} k"),
    (r"(to_v|v_proj|value|\.v|wv)(\.|$)", "{where} v"),
    (r"to_(add_)?out|out_proj|attn\d?\.proj|proj_attn|\.o$", "{where} out"),
    (r"conv1|conv_inverted|in_layers", "conv1"),
    (r"conv2|conv_point|conv_depth|out_layers", "conv2"),
    (r"(ff|mlp|feed_forward)\w*\.(net\.0|.*proj$|linear_1|fc1|w1|w3|0)|proj_mlp|gate_proj|up_proj", "ff-up"),
    (r"(ff|mlp|feed_forward)\w*\.(net\.2|linear_2|fc2|w2|2)|down_proj", "ff-down"),
    (r"attentions.*proj_in|(single|transformer_blocks).*proj_in", "proj-in"),
    (r"attentions.*proj_out|(single|transformer_blocks).*proj_out", "proj-out"),
    (r"proj_out_1$", "modulation"),
    (r"conv_in|x_emb|patch|pos_embed|proj_in|img_in", "in"),
    (r"conv_out|proj_out|final|norm_out|out$", "final"),
)


def role_of(layer: LayerRecord) -> str:
    """Return what a layer does: "self q", "cross out", "ff-up", "conv1", "time-MLP", "final"...

    What no pattern knows is "linear" or "conv": it shares nothing but its kind.
    """
    where = "self"
    if re.search(r"attn2|cross", layer.name):
        where = "cross"
    elif re.search(r"add_(q|k|v)|add_out|q_add", layer.name):
        where = "joint"
    for pattern, role in _RULES:
        if re.search(pattern, layer.name):
            return role.format(where=where)
    return "conv" if len(layer.shape) > 2 else "linear"
