"""Under the names of the original checkpoint, diffusers' own converters find every weight, to the last bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import gguf
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import single_file_utils
from typer.testing import CliRunner

import quantdm
from quantdm.cli.main import app
from quantdm.errors import QuantDMError
from quantdm.hub.gguf import export_gguf
from quantdm.modules.packed import packed_layers
from quantdm.recipe import Recipe

State = dict[str, torch.Tensor]
UNET = {
    "sample_size": 8, "block_out_channels": (32, 32, 64, 64), "norm_num_groups": 8, "cross_attention_dim": 32,
    "attention_head_dim": 8,
}  # fmt: skip
TRANSFORMER = {"attention_head_dim": 32, "num_attention_heads": 2, "in_channels": 16, "pooled_projection_dim": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd-1.5": ("UNet2DConditionModel", UNET),
    "sdxl": (
        "UNet2DConditionModel",
        {
            **UNET, "block_out_channels": (32, 64, 64), "use_linear_projection": True,
            "transformer_layers_per_block": [1, 2, 3],
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 96,
        },
    ),
    "one-layer-unet": ("UNet2DConditionModel", {**UNET, "layers_per_block": 1}),
    "flux": (
        "FluxTransformer2DModel",
        {
            **TRANSFORMER, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 32, "guidance_embeds": True,
            "axes_dims_rope": (8, 12, 12),
        },
    ),
    "flux-schnell": (
        "FluxTransformer2DModel",
        {
            **TRANSFORMER, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32,
            "axes_dims_rope": (8, 12, 12),
        },
    ),
    "sd3": ("SD3Transformer2DModel", {**TRANSFORMER, "num_layers": 2, "joint_attention_dim": 32,
        "caption_projection_dim": 64, "sample_size": 8, "patch_size": 2, "pos_embed_max_size": 8}),
    "sd3.5": ("SD3Transformer2DModel", {**TRANSFORMER, "num_layers": 3, "joint_attention_dim": 32,
        "caption_projection_dim": 64, "sample_size": 8, "patch_size": 2, "pos_embed_max_size": 8,
        "qk_norm": "rms_norm", "dual_attention_layers": (0,)}),
}  # fmt: skip
WIDTH, FLUX_WIDTH = 64, 3072  # of the tiny transformers; the one that diffusers' converter of FLUX counts on


class Lone(DiffusionPipeline):
    """A pipeline of nothing but a denoiser."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)


def packed(name: str, rules: dict[str, str] | None = None, default: str = "uniform-group32-4-symmetric") -> Lone:
    """Make a tiny model of random weights and quantize it."""
    kind, config = MODELS[name]
    torch.manual_seed(0)
    pipe = Lone(getattr(diffusers, kind)(**config).eval())
    quantdm.apply_recipe(pipe, Recipe(model=name, patterns={**(rules or {})}, default=default), insist=True)
    return pipe


def decoded(model: torch.nn.Module) -> State:
    """Return the state of the model that the packed one stands for."""
    layers = packed_layers(model)
    plain = {name: value for name, value in model.state_dict().items() if name.removesuffix(".packed") not in layers}
    return plain | {f"{name}.weight": layer.dequantize(dtype=torch.float32) for name, layer in layers.items()}


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    """Read a file's tensors by name."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def opened(path: Path) -> State:
    """Decode a file with the `gguf` package."""
    return {
        name: torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type).copy()).view(
            *(int(length) for length in reversed(found.shape))
        )
        for name, found in tensors(path).items()
    }


def from_ldm(state: State, config: dict[str, Any]) -> State:
    """Let diffusers rename a U-Net, which takes only names that it knows."""
    prefixed = {f"model.diffusion_model.{name}": value for name, value in state.items()}
    return single_file_utils.convert_ldm_unet_checkpoint(prefixed, config)


def from_flux(state: State, config: dict[str, Any]) -> State:
    """Let diffusers rename a FLUX transformer; its width there is a constant, so the four parts are padded to that."""
    lengths = (WIDTH, WIDTH, WIDTH, 4 * WIDTH)
    for name in [name for name in state if ".linear1." in name]:
        parts = state[name].split(lengths)
        pads = [part.new_zeros(len(part) * (FLUX_WIDTH - WIDTH) // WIDTH, *part.shape[1:]) for part in parts]
        state[name] = torch.cat([piece for pair in zip(parts, pads, strict=True) for piece in pair])
    found = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(state)
    assert not state
    for name in found:
        if "single" in name and any(part in name for part in ("to_q", "to_k", "to_v", "proj_mlp")):
            found[name] = found[name][: len(found[name]) * WIDTH // FLUX_WIDTH]
    return found


def from_sd3(state: State, config: dict[str, Any]) -> State:
    """Let diffusers rename an SD3 transformer."""
    found = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(state)
    assert not state
    return found


CONVERTERS: dict[str, Callable[[State, dict[str, Any]], State]] = {
    "UNet2DConditionModel": from_ldm,
    "FluxTransformer2DModel": from_flux,
    "SD3Transformer2DModel": from_sd3,
}


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_converters_find_every_weight(name: str, tmp_path: Path) -> None:
    pipe = packed(name, {"*to_k": "kmeans-channel-4", "*to_v": "log2-channel-3"})
    export_gguf(pipe, tmp_path / "x.gguf", names="original")
    state = opened(tmp_path / "x.gguf")
    found = CONVERTERS[MODELS[name][0]](dict(state), dict(pipe.transformer.config))
    expected = decoded(pipe.transformer)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert sum(value.numel() for value in state.values()) == sum(value.numel() for value in expected.values())


def test_stacked_parts_of_one_type_keep_their_bytes(tmp_path: Path) -> None:
    pipe = packed("flux")
    export_gguf(pipe, tmp_path / "ours.gguf")
    export_gguf(pipe, tmp_path / "theirs.gguf", names="original")
    ours, theirs = tensors(tmp_path / "ours.gguf"), tensors(tmp_path / "theirs.gguf")
    fused = theirs["double_blocks.1.txt_attn.qkv.weight"]
    parts = [ours[f"transformer_blocks.1.attn.add_{which}_proj.weight"] for which in "qkv"]
    assert {part.tensor_type.name for part in parts} == {fused.tensor_type.name} == {"Q4_0"}
    assert fused.data.tobytes() == b"".join(part.data.tobytes() for part in parts)
    swapped = theirs["final_layer.adaLN_modulation.1.weight"].data
    first, second = ours["norm_out.linear.weight"].data.reshape(2, -1)
    assert swapped.tobytes() == second.tobytes() + first.tobytes()


@pytest.mark.parametrize(
    ("other", "kind"),
    [("uniform-group32-5-symmetric", "Q5_0"), ("kmeans-channel-4", "Q8_0"), ("log2-channel-3", "F32")],
)
def test_stacked_parts_of_several_types_take_the_smallest_that_holds_all(other: str, kind: str, tmp_path: Path) -> None:
    pipe = packed("sd3", {"*attn.to_k": other})
    export_gguf(pipe, tmp_path / "x.gguf", names="original")
    assert tensors(tmp_path / "x.gguf")["joint_blocks.0.x_block.attn.qkv.weight"].tensor_type.name == kind
    stacked = opened(tmp_path / "x.gguf")["joint_blocks.0.x_block.attn.qkv.weight"]
    state = decoded(pipe.transformer)
    expected = torch.cat([state[f"transformer_blocks.0.attn.to_{which}.weight"] for which in "qkv"])
    assert torch.equal(stacked, expected)


def test_convolutions_keep_their_four_dimensions(tmp_path: Path) -> None:
    pipe = packed("sd-1.5")
    export_gguf(pipe, tmp_path / "x.gguf", names="original")
    state = opened(tmp_path / "x.gguf")
    assert state["input_blocks.1.1.proj_in.weight"].shape == (32, 32, 1, 1)
    assert state["input_blocks.3.0.op.weight"].shape == (32, 32, 3, 3)
    assert tensors(tmp_path / "x.gguf")["input_blocks.1.0.in_layers.0.weight"].tensor_type.name == "F32"


def test_what_has_no_original_is_refused_with_what_to_do(tmp_path: Path) -> None:
    pipe = quantdm.load_pipeline("digits-dit")
    quantdm.apply_recipe(pipe, Recipe(model="digits-dit", default="uniform-group32-4-symmetric"), insist=True)
    served = "known for FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel; leave names out"
    with pytest.raises(QuantDMError, match=served):
        export_gguf(pipe, tmp_path / "x.gguf", names="original")
    with pytest.raises(QuantDMError, match="names: got 'ldm', expected one of diffusers, original"):
        export_gguf(pipe, tmp_path / "x.gguf", names="ldm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"class_embed_type": "timestep"}, r"it has class_embedding\.linear_1\.bias and 3 more such tensors"),
        ({"layers_per_block": [1, 2, 1, 1]}, r"as many layers in every block, got \{'L': \[1, 2, 1, 1\]\}"),
        ({"resnet_time_scale_shift": "scale_shift"}, "the original has resnet_time_scale_shift 'default'"),
    ],
)
def test_a_unet_that_is_no_ldm_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipe = Lone(diffusers.UNet2DConditionModel(**{**UNET, **changed}).eval())
    quantdm.apply_recipe(pipe, Recipe(model="unet", default="uniform-group32-4-symmetric"), insist=True)
    with pytest.raises(QuantDMError, match=message):
        export_gguf(pipe, tmp_path / "x.gguf", names="original")


def test_the_command_takes_the_names(tmp_path: Path) -> None:
    pipe = quantdm.load_pipeline("digits-sd")
    quantdm.apply_recipe(pipe, Recipe(model="digits-sd", default="uniform-group32-4-symmetric"), insist=True)
    pipe.save_pretrained(tmp_path / "small")
    out = tmp_path / "x.gguf"
    done = CliRunner().invoke(app, ["gguf", str(tmp_path / "small"), "-o", str(out), "--names", "original"])
    assert done.exit_code == 0, done.output
    assert "input_blocks.0.0.weight" in tensors(out)


def test_the_page_says_what_the_readers_found() -> None:
    root = Path(__file__).parents[1]
    record = json.loads((root / "eval" / "results" / "gguf_readers.json").read_text())
    page = (root / "docs" / "gguf.md").read_text()
    assert not any(found["differing"] for found in record["names and shapes"].values())
    for name in ("sd-1.5", "flux", "sd3"):
        comfyui = record[name]["ComfyUI, original"]
        assert f"ComfyUI {comfyui['version']} with ComfyUI-GGUF {comfyui['ComfyUI-GGUF']}" in page
        assert comfyui["missing"] == comfyui["unexpected"] == []
        assert comfyui["largest difference by largest value"] < 3e-6
        assert ("failed" in record[name]["ComfyUI, diffusers"]) == (name != "sd-1.5")
    for name in ("sd-1.5", "flux"):
        sampled = record[name]["stable-diffusion.cpp, original"]
        assert sampled["version"] in page
        assert not any(sampled[key] for key in ("exit code", "missing", "unknown", "wrong shape"))
        assert record[name]["stable-diffusion.cpp, diffusers"]["exit code"] != 0
    image = record["sd-1.5"]["stable-diffusion.cpp, original"]
    assert image["largest difference to diffusers, of 255"] < 1
    assert image["largest difference to diffusers without a U-Net, of 255"] > 10
