"""Which layers take how many activation bits."""

from fnmatch import fnmatchcase

from torch import nn

from quantdm.denoisers.inventory import LayerRecord, list_layers
from quantdm.errors import QuantDMError, nearest
from quantdm.recipe import ActivationSpec

# Layers that stay at 8 bits (docs/method.md, Activations), as globs on operation types; see `default_keep_8bit`.
KEEP_8BIT: tuple[str, ...] = (
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


def matches_layer(record: LayerRecord, pattern: str) -> bool:
    return fnmatchcase(record.op_type, pattern) or fnmatchcase(record.name, pattern)


def default_keep_8bit(denoiser: nn.Module) -> tuple[str, ...]:
    """Return the globs of `KEEP_8BIT` that match a layer of this denoiser (a recipe's glob must match something)."""
    records = list_layers(denoiser)
    return tuple(p for p in KEEP_8BIT if any(fnmatchcase(record.op_type, p) for record in records))


def layer_bits(denoiser: nn.Module, spec: ActivationSpec) -> dict[str, int]:
    """Return the activation bits of every layer: layer name -> 6 or 8.

    Raises:
        QuantDMError: a glob of `keep_8bit` matches no layer name and no operation type.
    """
    records = list_layers(denoiser)
    for pattern in spec.keep_8bit:
        if not any(matches_layer(record, pattern) for record in records):
            known = dict.fromkeys(record.op_type for record in records)
            raise QuantDMError(
                f"keep_8bit: {pattern!r} matches no layer and no operation type; {nearest(pattern, known)}"
            )
    return {r.name: 8 if any(matches_layer(r, p) for p in spec.keep_8bit) else spec.bits for r in records}
