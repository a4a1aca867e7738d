"""The layers whose inputs are worth more bits than the others' (docs/method.md, Activations)."""

from fnmatch import fnmatchcase

from torch import nn

from quantdm.denoisers.inventory import list_layers
from quantdm.recipe import ActivationSpec

# Globs on operation types: the ends, the embedding of the time, and what follows the non-linearity of a feed-forward.
SENSITIVE: tuple[str, ...] = (
    "conv_in",
    "conv_out",
    "*x_embedder",
    "*pos_embed.proj",
    "*patch_embed*",
    "*time_embed*",
    "*timestep_embedder*",
    "*time_text_embed*",
    "*time_emb_proj",
    "*adaln_single*",
    "proj_out",
    "proj_out_[0-9]",
    "final_layer*",
    "ff*.net.2",
    "*ff_context.net.2",
    "*mlp.fc2",
)


def sensitive_types(denoiser: nn.Module) -> tuple[str, ...]:
    """Return the operation types of a denoiser whose inputs usually stay at 8 bits, in the order of its layers."""
    kinds = dict.fromkeys(record.op_type for record in list_layers(denoiser))
    return tuple(kind for kind in kinds if any(fnmatchcase(kind, glob) for glob in SENSITIVE))


def usual_activations(denoiser: nn.Module, bits: int) -> ActivationSpec:
    """Return dynamic activation quantization per token at `bits`, the sensitive layers at 8 bits.

    Queries, keys and values take `bits` as well. Integer products can compute all of it.
    """
    kept: dict[str, str | None] = {} if bits >= 8 else dict.fromkeys(sensitive_types(denoiser), "token-8")
    return ActivationSpec(default=f"token-{bits}", types=kept, attention=f"token-{bits}")
