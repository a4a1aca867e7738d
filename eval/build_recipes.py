"""Write the recipes of public denoisers from published insights, at the published sizes.

    PYTHONPATH=. python eval/build_recipes.py            # all of them, into recipes/
    PYTHONPATH=. python eval/build_recipes.py sdxl dit   # those whose file name contains a word

The rules come from the insights of the Qua2SeDiMo paper (arXiv 2412.14628); only which types, and of the last one which
blocks, go to 3 bits follows from the size: types are lowered in the order of a plan until the average bits, overhead
included, are those of the title. Weights are not needed: layers are counted on the meta device.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch

from quantdm.denoisers.inventory import LayerRecord, list_layers
from quantdm.files import atomic_path
from quantdm.hub.quantize import average_bits
from quantdm.recipe import PUBLISHED_INSIGHT, Recipe, Rules, load_recipe
from tests.architectures import PUBLIC

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
EDGES = "the ends of the network: they weigh next to nothing, and the final projection matters"
TIME = "the time embedding matters more than the caption embedding"
CAPTION = "the caption embedding matters less"
QUERY = "query projections go to 3 bits most readily"
REST = "then, for the size: keys, the feed-forward, values"
UNET, TRANSFORMER = "U-Nets favour uniform quantization", "transformers lean to k-means"

# Operation types in the order in which they go to 3 bits.
DENOISER_ORDER = (
    "attn1.to_q", "attn2.to_q", "attn1.to_k", "attn2.to_k", "ff.net.0.proj", "attn1.to_v", "attn2.to_v", "ff.net.2",
    "attn1.to_out.0", "attn2.to_out.0", "norm1.linear",
)  # fmt: skip
JOINT_ORDER = ("attn.to_q", "attn.add_q_proj", "attn2.to_q", "attn.add_k_proj", "attn.to_k", "ff_context.net.0.proj")


@dataclass(frozen=True)
class Plan:
    """What is decided by hand for one model; `title` is the average bits to land on."""

    file: str
    model: str
    architecture: str
    title: float
    why: str = TRANSFORMER
    method: str = "kmeans-channel"
    patterns: dict[str, tuple[str, str]] = field(default_factory=dict)  # pattern -> (scheme, why)
    order: Sequence[str] = DENOISER_ORDER


PIXART = {
    "pos_embed.proj": ("uniform-channel-8", EDGES),
    "proj_out": ("uniform-channel-8", EDGES),
    "adaln_single.emb.*": ("kmeans-channel-6", TIME),
    "caption_projection.*": ("kmeans-channel-3", CAPTION),
}
UNET_ENDS = {
    "conv_in": ("uniform-channel-8", EDGES),
    "conv_out": ("uniform-channel-8", EDGES),
    "time_embedding.*": ("uniform-channel-6", "the time embedding matters"),
}
JOINT_ENDS = {
    "proj_out": ("uniform-channel-8", EDGES),
    "norm_out.linear": ("kmeans-channel-6", EDGES),
    "time_text_embed.*": ("kmeans-channel-6", TIME),
    "context_embedder": ("kmeans-channel-3", CAPTION),
}
PLANS = (
    Plan("pixart-alpha-3.4bit", "PixArt-alpha/PixArt-XL-2-512x512", "pixart-xl-2", 3.4, patterns=PIXART),
    Plan("pixart-sigma-3.9bit", "PixArt-alpha/PixArt-Sigma-XL-2-512-MS", "pixart-xl-2", 3.9, patterns=PIXART),
    Plan(
        "hunyuan-dit-3.65bit",
        "Tencent-Hunyuan/HunyuanDiT-Diffusers",
        "hunyuan-dit",
        3.65,
        patterns={
            "pos_embed.proj": ("uniform-channel-8", EDGES),
            "proj_out": ("uniform-channel-8", EDGES),
            "norm_out.linear": ("kmeans-channel-6", EDGES),
            "time_extra_emb.*": ("kmeans-channel-6", TIME),
            "text_embedder.*": ("kmeans-channel-3", CAPTION),
        },
    ),
    Plan(
        "dit-xl-2-3.5bit",
        "facebook/DiT-XL-2-256",
        "dit-xl-2",
        3.5,
        patterns={
            "pos_embed.proj": ("uniform-channel-8", EDGES),
            "proj_out_*": ("kmeans-channel-6", EDGES),
            "*.timestep_embedder.*": ("kmeans-channel-4", "the time embedding matters: not below 4 bits"),
        },
    ),
    Plan(
        "sdxl-3.7bit",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "sdxl",
        3.7,
        why=UNET,
        method="uniform-channel",
        patterns={
            **UNET_ENDS,
            "add_embedding.*": ("uniform-channel-4", CAPTION),
            "*.resnets.*": ("uniform-channel-4", "ResBlocks are far more sensitive than attention: not below 4 bits"),
        },
    ),
    Plan(
        "sd-1.5-4.0bit",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "sd-1.5",
        4.0,
        why=UNET,
        method="uniform-channel",
        patterns=UNET_ENDS,
    ),
    Plan(
        "sd-3.5-medium-4.0bit",
        "stabilityai/stable-diffusion-3.5-medium",
        "sd-3.5-medium",
        4.0,
        patterns={"pos_embed.proj": ("uniform-channel-8", EDGES), **JOINT_ENDS},
        order=JOINT_ORDER,
    ),
    Plan(
        "flux.1-4.0bit",
        "black-forest-labs/FLUX.1-dev",
        "flux.1-dev",
        4.0,
        patterns={"x_embedder": ("uniform-channel-8", EDGES), **JOINT_ENDS},
        order=JOINT_ORDER,
    ),
)


def build(plan: Plan) -> Recipe:
    """Lower types, then blocks of the next type, until the plan's size is reached; write and return the recipe."""
    name, config = PUBLIC[plan.architecture]
    with torch.device("meta"):
        layers = list_layers(getattr(diffusers, name)(**config))
    order = [op_type for op_type in plan.order if any(layer.op_type == op_type for layer in layers)]
    low: list[str] = []
    while order and size(plan, layers, [*low, order[0]]) >= plan.title:
        low.append(order.pop(0))
    partly = order[0]
    middle = centre_first(sorted({block_of(layer.name) for layer in layers if layer.op_type == partly}))
    sizes = [size(plan, layers, low, partly, middle[:count]) for count in range(len(middle) + 1)]
    count = min(range(len(sizes)), key=lambda count: abs(sizes[count] - plan.title))
    exception: dict[str, tuple[str, str]] = {}
    if count > len(middle) / 2:  # shorter to name the blocks that keep 4 bits
        low.append(partly)
        if middle[count:]:
            pattern = block_pattern(partly, sorted(middle[count:]))
            exception = {pattern: (f"{plan.method}-4", f"for the size, the outer blocks of {partly} stay at 4 bits")}
    elif count:
        pattern = block_pattern(partly, sorted(middle[:count]))
        exception = {pattern: (f"{plan.method}-3", f"for the size, the middle blocks of {partly} go to 3 bits too")}
    path = FOLDER / f"{plan.file}.yaml"
    with atomic_path(path) as temporary:
        temporary.write_text(write(plan, low, exception, sizes[count]), encoding="utf-8")
    return load_recipe(path)


def size(
    plan: Plan, layers: Sequence[LayerRecord], low: Sequence[str], partly: str = "", blocks: Sequence[int] = ()
) -> float:
    """Return the average bits when the types `low`, and some blocks of the type `partly`, have 3 bits."""
    patterns: dict[str, str | None] = {pattern: label for pattern, (label, _) in plan.patterns.items()}
    if blocks:
        patterns[block_pattern(partly, blocks)] = f"{plan.method}-3"
    types: dict[str, str | None] = dict.fromkeys(low, f"{plan.method}-3")
    return average_bits(layers, Rules(default=f"{plan.method}-4", types=types, patterns=patterns).resolve(layers))


def block_of(layer_name: str) -> int:
    """Return the last number in a layer's path that counts blocks."""
    return int(re.findall(r"blocks\.(\d+)\.", layer_name)[-1])


def block_pattern(op_type: str, blocks: Sequence[int]) -> str:
    """Return the pattern of one operation type in some blocks."""
    return rf"re:.*blocks\.({'|'.join(map(str, blocks))})\.{re.escape(op_type)}"


def centre_first(blocks: list[int]) -> list[int]:
    """Order blocks from the middle outwards."""
    middle = (blocks[0] + blocks[-1]) / 2
    return sorted(blocks, key=lambda block: (abs(block - middle), block))


def write(plan: Plan, low: Sequence[str], exception: dict[str, tuple[str, str]], bits: float) -> str:
    """Return the recipe as YAML text that says why."""
    lines = [
        f"# {plan.title:g} bits per weight from published insights: a place to start from, not a measured result.",
        "# Written by eval/build_recipes.py. To change it, write a file that says `extends:`, or measure your own with",
        "# `quantdm search`.",
        "version: 1",
        f"model: {plan.model}",
        f"default: {plan.method}-4  # {plan.why}",
    ]
    if low:
        lines.append("types:")
        for first, why in ((True, QUERY), (False, REST)):
            chosen = [op_type for op_type in low if is_query(op_type) == first]
            lines += [f"  # {why}"] * bool(chosen) + [f"  {op_type}: {plan.method}-3" for op_type in chosen]
    lines.append("patterns:")
    said = ""
    for pattern, (label, why) in (plan.patterns | exception).items():
        lines += [f"  # {why}"] * (why != said) + [f"  '{pattern}': {label}"]
        said = why
    lines += [
        f"avg_bits: {bits:.4f}",
        "provenance:",
        f"  source: {PUBLISHED_INSIGHT}",
        "  reference: 'Qua2SeDiMo, AAAI-25, arXiv 2412.14628: its findings per operation type, and its sizes'",
        f"  target: {plan.title:g} bits per weight",
    ]
    return "\n".join(lines) + "\n"


def is_query(op_type: str) -> bool:
    """Whether an operation type is a query projection."""
    return op_type.endswith(("to_q", "add_q_proj"))


def main(words: Sequence[str]) -> None:
    """Build the recipes whose file names contain one of the words (all of them without words)."""
    for plan in PLANS:
        if not words or any(word in plan.file for word in words):
            recipe = build(plan)
            print(f"{plan.file:<24} {recipe.avg_bits:.4f} bits per weight, title {plan.title:g}")


if __name__ == "__main__":
    main(sys.argv[1:])
