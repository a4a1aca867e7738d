"""The inventory: public counts, long skips found from the trace, the same list for real, meta and quantized models."""

import diffusers
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from quantdm.denoisers.inventory import list_layers
from quantdm.denoisers.names import op_type_of, stage_of
from quantdm.errors import QuantDMError
from tests.architectures import PUBLIC

# The public configurations (values that differ from the classes' defaults) and the table of docs/method.md, Layers and
# the cost in bits:
# layers, weights, and per operation type the seams of the layers that read a concatenated long skip. In a U-Net the
# seam is the width of the main path: what the previous resnet (or, after the mid block, the widest level) puts out.
SDXL_SEAMS = [1280, 1280, 1280, 1280, 640, 640, 640, 320, 320]
SD15_SEAMS = [1280] * 7 + [640] * 3 + [320] * 2
EXPECTED = {
    "pixart-xl-2": (287, 610_228_224, {}),
    "hunyuan-dit": (472, 1_514_326_016, {"blocks.skip_linear": [1408] * 19}),
    "sdxl": (794, 2_565_880_320, {"resnets.conv1": SDXL_SEAMS, "resnets.conv_shortcut": SDXL_SEAMS}),
    "sd-1.5": (282, 859_077_120, {"resnets.conv1": SD15_SEAMS, "resnets.conv_shortcut": SD15_SEAMS}),
    "dit-xl-2": (255, 716_986_368, {}),
    "sd-3.5-medium": (393, 2_241_921_024, {}),
    "flux.1-dev": (504, 11_898_322_944, {}),
}
TINY_DIT = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_num_groups": 4,
}  # fmt: skip
TINY_UNET = {
    "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 16, "attention_head_dim": 2,
}  # fmt: skip


def build(cls: str, config: dict, device: str = "meta") -> nn.Module:
    with torch.device(device):
        return getattr(diffusers, cls)(**config)


class Joined(ModelMixin, ConfigMixin):
    """Two convolutions and a concatenation: of a long skip, of siblings, or with the input itself."""

    @register_to_config
    def __init__(self, in_channels: int = 4, width: int = 8, join: str = "skip", groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.sibling = nn.Conv2d(width, width, 1)
        self.norm = nn.GroupNorm(2, 3 * width)
        self.reader = nn.Linear(3 * width, width)
        self.grouped = nn.Conv2d(3 * width, 3 * width, 1, groups=groups)

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = self.first(sample)
        deep, sibling = self.second(first), self.sibling(first)
        parts = {"skip": (deep, first), "reversed": (first, deep), "siblings": (deep, sibling)}[self.config.join]
        joined = torch.nn.functional.silu(self.norm(torch.cat(parts, dim=1)))
        tokens = joined.flatten(2).transpose(1, 2)
        other = torch.cat([tokens, tokens * 2], dim=1)  # along the tokens: no seam in the channels
        return self.reader(other), self.grouped(joined), sibling


class Strange(ModelMixin, ConfigMixin):
    """A forward whose required arguments no rule knows."""

    @register_to_config
    def __init__(self, in_channels: int = 4) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, 3)

    def forward(self, hidden_states: torch.Tensor, aura: torch.Tensor, *, mood: torch.Tensor) -> torch.Tensor:
        return self.proj(hidden_states) + aura + mood


@pytest.mark.parametrize("name", PUBLIC)
def test_counts_and_long_skips_of_public_architectures(name: str) -> None:
    denoiser = build(*PUBLIC[name])
    layers = list_layers(denoiser)
    num_layers, num_weights, skips = EXPECTED[name]
    assert len(layers) == num_layers
    assert sum(r.num_weights for r in layers) == num_weights
    found: dict[str, list[int | None]] = {}
    for record in layers:
        if record.quantizers == 2:
            found.setdefault(record.op_type, []).append(record.split)
    assert found == skips
    assert all((r.split is None) == (r.quantizers == 1) for r in layers)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    assert [r.name for r in layers] == [n for n, m in denoiser.named_modules() if isinstance(m, kinds)]
    assert sorted(r.index for r in layers) == list(range(num_layers))


def test_long_skips_lie_in_the_up_path_of_a_unet() -> None:
    layers = list_layers(build(*PUBLIC["sd-1.5"]))
    assert {r.stage for r in layers if r.split} == {"up"}
    by_stage = {s: {r.name.split(".")[0] for r in layers if r.stage == s} for s in ("down", "mid", "up")}
    assert by_stage == {"down": {"down_blocks"}, "mid": {"mid_block"}, "up": {"up_blocks"}}


@pytest.mark.parametrize(("join", "seam"), [("skip", 16), ("reversed", 8), ("siblings", None)])
def test_seam_is_found_through_norm_activation_and_reshape(join: str, seam: int | None) -> None:
    by_name = {r.name: r for r in list_layers(Joined(join=join))}
    assert by_name["reader"].split == seam
    assert by_name["grouped"].split == seam
    assert {r.split for n, r in by_name.items() if n not in ("reader", "grouped")} == {None}


def test_grouped_convolution_has_no_seam() -> None:
    by_name = {r.name: r for r in list_layers(Joined(groups=2))}
    assert by_name["reader"].split == 16
    assert by_name["grouped"].split is None


def test_fused_skip_free_concatenation_of_a_parallel_block_is_no_seam() -> None:
    flux = build(
        "FluxTransformer2DModel",
        {
            "num_layers": 1, "num_single_layers": 1, "in_channels": 4, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (4, 4, 8),
        },
    )  # fmt: skip
    assert {r.split for r in list_layers(flux)} == {None}


@pytest.mark.parametrize(("cls", "config"), [("DiTTransformer2DModel", TINY_DIT), ("UNet2DConditionModel", TINY_UNET)])
def test_real_meta_and_quantized_denoisers_have_one_inventory(cls: str, config: dict) -> None:
    class Packed(nn.Linear):
        def __init__(self, origin: nn.Linear) -> None:
            super().__init__(1, 1, device="meta")
            self.weight = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)

    real = build(cls, config, "cpu")
    expected = list_layers(build(cls, config))
    before = {k: v.clone() for k, v in real.state_dict().items()}
    state = torch.get_rng_state()
    assert list_layers(real) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in real.state_dict().items())
    for record in expected:
        parent, _, leaf = record.name.rpartition(".")
        if record.kind == "linear":
            module = real.get_submodule(parent)
            setattr(module, leaf, Packed(getattr(module, leaf)))
    assert list_layers(real) == expected
    assert list_layers(real.to(torch.bfloat16)) == expected


def test_operation_types_are_shared_between_denoisers() -> None:
    types = {n: {r.op_type for r in list_layers(build(*PUBLIC[n]))} for n in PUBLIC}
    assert types["sdxl"] - types["sd-1.5"] == {"add_embedding.linear_1", "add_embedding.linear_2"}
    ff = {"ff.net.0.proj", "ff.net.2"}
    assert ff <= set.intersection(*types.values())
    joint = ("sd-3.5-medium", "flux.1-dev")  # text and image attend together there
    for names, attention in ((joint, "attn"), ([n for n in PUBLIC if n not in joint], "attn1")):
        shared = {f"{attention}.to_{x}" for x in ("q", "k", "v", "out.0")}
        assert shared <= set.intersection(*(types[n] for n in names))
    assert all(not t.split(".")[0].isdigit() for ts in types.values() for t in ts)
    assert len(types["sdxl"]) < 30


def test_paths_name_stage_and_operation() -> None:
    below = {"down_blocks.0": 9, "down_blocks.0.resnets.1": 3, "mlp.0": 1, "mlp.2": 1}
    below |= {"down_blocks.0.resnets.1.conv1": 1, "down_blocks.0.downsamplers.0": 1}
    assert op_type_of("down_blocks.0.resnets.1.conv1", below) == "resnets.conv1"
    assert op_type_of("down_blocks.0.downsamplers.0.conv", below) == "downsamplers.0.conv"
    assert op_type_of("mlp.2", below) == "mlp.2"
    assert [stage_of(p) for p in ("mid_block.attentions.0", "conv_in", "transformer_blocks.0")] == ["mid", "", ""]


def test_input_that_cannot_be_inferred_is_named() -> None:
    with pytest.raises(QuantDMError, match=r"aura, mood.*example_inputs"):
        list_layers(Strange())
    given = {"hidden_states": torch.zeros(1, 2, 4), "aura": torch.zeros(3), "mood": torch.zeros(1)}
    assert [r.name for r in list_layers(Strange(), example_inputs=given)] == ["proj"]
    with pytest.raises(QuantDMError, match=r"fails on the meta device.*aura.*7"):
        list_layers(Strange(), example_inputs={**given, "aura": torch.zeros(7)})


def test_what_is_no_denoiser_is_refused() -> None:
    with pytest.raises(QuantDMError, match=r"got Linear.*pipe\.unet"):
        list_layers(nn.Linear(2, 2))
    with pytest.raises(QuantDMError, match="got DDIMScheduler"):  # has a config, but no layers
        list_layers(diffusers.DDIMScheduler())  # pyright: ignore
    with pytest.raises(QuantDMError, match="got str"):
        list_layers("sdxl")  # pyright: ignore


def test_modules_that_left_the_configuration_are_refused() -> None:
    changed = build("DiTTransformer2DModel", TINY_DIT, "cpu")
    changed.transformer_blocks[1].attn1.to_qkv = nn.Linear(16, 48)
    with pytest.raises(QuantDMError, match=r"transformer_blocks\.1\.attn1\.to_qkv.*unfuse"):
        list_layers(changed)
    del changed.transformer_blocks[1]
    with pytest.raises(QuantDMError, match=r"transformer_blocks\.1"):
        list_layers(changed)
