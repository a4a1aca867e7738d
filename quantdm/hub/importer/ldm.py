"""Layer names of the LDM code base for Stable Diffusion's U-Net."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Inside the blocks of a U-Net: LDM's name -> diffusers' name.
RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
}


def ldm_names(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (LDM's module path, layer name) for the layers of a U-Net; nothing for other denoisers."""
    parts: dict[str, list[str]] = {}  # e.g. down_blocks.0.resnets.1 -> its layers, without this prefix
    for name in names:
        match = re.match(r"((?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\.\w+\.\d+)\.(.+)", name)
        if match:
            parts.setdefault(match[1], []).append(match[2])
    yield from ((old, new) for old, new in _ENDS.items() if new in set(names))

    def inside(old: str, new: str) -> Iterator[tuple[str, str]]:
        resnet = {diffusers: ldm for ldm, diffusers in RESNET.items()}
        for leaf in parts.get(new, []):
            yield f"{old}.{resnet.get(leaf, leaf)}", f"{new}.{leaf}"

    index = 1  # 0 is conv_in
    for block in _numbered(parts, "down_blocks"):
        for i in _numbered(parts, f"down_blocks.{block}.resnets"):
            yield from inside(f"input_blocks.{index}.0", f"down_blocks.{block}.resnets.{i}")
            yield from inside(f"input_blocks.{index}.1", f"down_blocks.{block}.attentions.{i}")
            index += 1
        if f"down_blocks.{block}.downsamplers.0" in parts:
            yield f"input_blocks.{index}.0.op", f"down_blocks.{block}.downsamplers.0.conv"
            index += 1
    for old, new in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield from inside(f"middle_block.{old}", f"mid_block.{new}")
    index = 0
    for block in _numbered(parts, "up_blocks"):
        resnets = _numbered(parts, f"up_blocks.{block}.resnets")
        for i in resnets:
            attention = f"up_blocks.{block}.attentions.{i}"
            yield from inside(f"output_blocks.{index}.0", f"up_blocks.{block}.resnets.{i}")
            yield from inside(f"output_blocks.{index}.1", attention)
            if i == resnets[-1] and f"up_blocks.{block}.upsamplers.0" in parts:
                position = 2 if attention in parts else 1
                yield f"output_blocks.{index}.{position}.conv", f"up_blocks.{block}.upsamplers.0.conv"
            index += 1


def _numbered(parts: Mapping[str, Any], prefix: str) -> list[int]:
    """Return the numbers that follow a prefix, in order."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)(?:\.|$)")
    return sorted({int(match[1]) for match in map(pattern.match, parts) if match})
