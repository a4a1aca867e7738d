"""GGUF files hold exactly what the packed layers hold, and diffusers opens them."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, GGUFQuantizationConfig, UNet2DConditionModel
from typer.testing import CliRunner

import quantdm
from quantdm.cli.main import app
from quantdm.errors import QuantDMError
from quantdm.hub.gguf import architecture_of, export_gguf, integer_blocks
from quantdm.modules.packed import packed_layers
from quantdm.quantizers import quantize_weight
from quantdm.recipe import Recipe
from quantdm.schemes import Scheme


def weight(rows: int = 6, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05


@pytest.mark.parametrize(
    "label",
    [
        "uniform-group32-4-symmetric", "uniform-group32-5-symmetric", "uniform-group32-8-symmetric",
        "uniform-channel-3", "uniform-group64-4", "uniform-tensor-2", "kmeans-channel-4", "kmeans-group32-3",
    ],
)  # fmt: skip
def test_what_is_integers_times_a_step_is_found_exactly(label: str) -> None:
    quantized = quantize_weight(weight(), Scheme.parse(label))
    found = integer_blocks(quantized)
    assert found is not None
    step, whole = found
    product = whole.float() * step.float()[..., None]
    assert torch.equal(product.flatten(1), quantized.dequantize(dtype=torch.float32))


@pytest.mark.parametrize(
    "label", ["log2-channel-3", "kmeans-tensor-4", "kmeans-shared-3", "uniform-channel-4-hadamard"]
)
def test_what_is_not_is_refused(label: str) -> None:
    assert integer_blocks(quantize_weight(weight(), Scheme.parse(label))) is None


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    assert integer_blocks(quantize_weight(weight(columns=80), Scheme.parse("uniform-channel-4"))) is None
    halves = quantize_weight(weight(), Scheme.parse("uniform-channel-4"), split=48)
    assert integer_blocks(halves) is None
    assert integer_blocks(quantize_weight(weight(), Scheme.parse("uniform-channel-4"), split=32)) is not None


def test_readers_find_the_decoded_weights(tmp_path: Path) -> None:
    pipe = quantdm.load_pipeline("digits-dit")
    quantdm.apply_recipe(
        pipe,
        Recipe(model="digits-dit", patterns={"*to_q": "uniform-group32-4-symmetric"}, default="kmeans-channel-4"),
        insist=True,
    )
    counts = export_gguf(pipe, tmp_path / "dit.gguf")
    assert counts["Q4_0"] == 6
    assert counts["Q8_0"] > 0
    reader = gguf.GGUFReader(tmp_path / "dit.gguf")
    names = {tensor.name: tensor for tensor in reader.tensors}
    layers = packed_layers(pipe.transformer)
    for name, layer in layers.items():
        tensor = names[f"{name}.weight"]
        decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        expected = layer.dequantize(dtype=torch.float32).numpy()
        assert np.array_equal(decoded.reshape(expected.shape), expected), name
    plain = {name for name in pipe.transformer.state_dict() if not name.endswith(".packed")}
    assert set(names) == plain | {f"{name}.weight" for name in layers}


class Lone(DiffusionPipeline):
    """A pipeline of nothing but a transformer."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


def call(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 4, 16, generator=generator),
            encoder_hidden_states=torch.randn(1, 3, 64, generator=generator),
            pooled_projections=torch.randn(1, 32, generator=generator),
            timestep=torch.tensor([0.5]), img_ids=torch.zeros(4, 3), txt_ids=torch.zeros(3, 3),
        ).sample  # fmt: skip


def test_diffusers_opens_the_file(tmp_path: Path) -> None:
    model = flux()
    model.save_pretrained(tmp_path / "model" / "transformer")
    rules = {"*attn*": "uniform-group32-4-symmetric", "*ff*": "kmeans-channel-4"}
    pipe = Lone(model)
    quantdm.apply_recipe(pipe, Recipe(model="flux", patterns=rules, default="uniform-channel-6"), insist=True)
    counts = export_gguf(pipe, tmp_path / "flux.gguf")
    assert {"Q4_0", "Q8_0", "F32"} <= counts.keys()
    opened = FluxTransformer2DModel.from_single_file(
        str(tmp_path / "flux.gguf"), config=str(tmp_path / "model"), subfolder="transformer",
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32), torch_dtype=torch.float32,
    )  # fmt: skip
    expected, found = call(model), call(opened)
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()  # diffusers decodes in fp16
    assert (tmp_path / "flux.gguf").stat().st_size < sum(p.numel() for p in flux().parameters()) * 2


def test_architectures_have_their_readers_names() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=768, sample_size=8, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip
    assert architecture_of(unet) == "sd1"
    assert architecture_of(flux()) == "flux"
    assert architecture_of(torch.nn.Linear(2, 2)) == "Linear"


def test_bad_input_is_one_clear_error(tmp_path: Path) -> None:
    pipe = Lone(flux())
    with pytest.raises(QuantDMError, match=r"expected a name that ends in \.gguf"):
        export_gguf(pipe, tmp_path / "flux.bin")
    with pytest.raises(QuantDMError, match="no packed layers; apply a recipe first"):
        export_gguf(pipe, tmp_path / "flux.gguf")
    with pytest.raises(QuantDMError, match="part: got 'unet', expected one of transformer"):
        export_gguf(pipe, tmp_path / "flux.gguf", part="unet")
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_became_of_the_layers(tmp_path: Path) -> None:
    pipe = quantdm.load_pipeline("digits-dit")
    quantdm.apply_recipe(pipe, Recipe(model="digits-dit", default="uniform-group32-4-symmetric"), insist=True)
    pipe.save_pretrained(tmp_path / "small")
    out = tmp_path / "dit.gguf"
    done = CliRunner().invoke(app, ["gguf", str(tmp_path / "small"), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "Q4_0" in done.output
    assert out.is_file()
