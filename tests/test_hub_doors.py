"""Every way into diffusers and transformers: single files, device maps, auto classes, pipelines with two components."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    PipelineQuantizationConfig,
    UNet2DConditionModel,
)
from torch import nn
from transformers import T5Config, T5EncoderModel

from quantdm.errors import QuantDMError
from quantdm.hub import QuantDMConfig, apply_recipe
from quantdm.modules import packed_layers
from quantdm.schemes import QuantConfig, Scheme
from tests.forge import edit_file
from tests.hub_models import DTYPES, MODELS, WEIGHTS, equal_files, load, mixed_recipe, run, save_dense, uniform_config


@pytest.fixture(scope="module")
def dense_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_dense(tmp_path_factory.mktemp("dense"))


def from_file(path: Path, config: Path, **options: object) -> nn.Module:
    """Open a U-Net from a single file."""
    return UNet2DConditionModel.from_single_file(str(path), config=str(config), **options)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_single_file_is_quantized_on_the_fly_and_saved_like_any_other(
    dtype: torch.dtype, dense_dirs: dict[str, Path], tmp_path: Path
) -> None:
    dense = dense_dirs["unet"]
    expected = load(dense, dtype=dtype)
    recipe = mixed_recipe(expected)
    apply_recipe(expected, recipe, insist=True).save_pretrained(tmp_path / "expected")
    model = from_file(dense / WEIGHTS, dense, dtype=dtype, quantization_config=QuantDMConfig(recipe=recipe))
    assert len(packed_layers(model)) == len(packed_layers(expected))
    assert torch.equal(run(model), run(expected))
    model.save_pretrained(tmp_path / "saved")
    assert equal_files(tmp_path / "saved" / WEIGHTS, tmp_path / "expected" / WEIGHTS)
    assert torch.equal(run(load(tmp_path / "saved", dtype=dtype)), run(expected))


def test_an_export_is_not_opened_as_a_single_file(dense_dirs: dict[str, Path], tmp_path: Path) -> None:
    model = load(dense_dirs["unet"])
    apply_recipe(model, uniform_config(model), insist=True).save_pretrained(tmp_path)
    with pytest.raises(QuantDMError, match="open its directory with from_pretrained"):
        from_file(
            tmp_path / WEIGHTS, dense_dirs["unet"], quantization_config=QuantDMConfig(recipe=uniform_config(model))
        )


def test_a_dense_model_with_lost_weights_is_not_quantized(dense_dirs: dict[str, Path], tmp_path: Path) -> None:
    model = load(dense_dirs["dit"])
    config = QuantDMConfig(recipe=uniform_config(model))
    for lost in ("proj_out_1.weight", "proj_out_1.bias"):
        model.save_pretrained(tmp_path)
        edit_file(tmp_path / WEIGHTS, lambda _, tensors, lost=lost: tensors.pop(lost))
        with pytest.raises(QuantDMError, match="proj_out_1"):
            load(tmp_path, quantization_config=config)


def test_a_dense_text_encoder_with_lost_weights_is_not_quantized(tmp_path: Path) -> None:
    text = tiny_t5()
    text.save_pretrained(tmp_path)
    lost = "encoder.block.1.layer.0.SelfAttention.q"
    edit_file(tmp_path / "model.safetensors", lambda _, tensors: tensors.pop(f"{lost}.weight"))
    with pytest.raises(QuantDMError, match=f"{lost}: its weight was not in the checkpoint"):
        T5EncoderModel.from_pretrained(tmp_path, quantization_config=QuantDMConfig(recipe=text_config(text)))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
@pytest.mark.parametrize("size", ["10GB", "20KB"], ids=["whole", "shards"])
@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
def test_device_maps_open_exports_and_quantize_on_the_fly(
    size: str, device_map: object, dense_dirs: dict[str, Path], tmp_path: Path
) -> None:
    model = load(dense_dirs["pixart"])
    recipe = mixed_recipe(model)
    apply_recipe(model, recipe, insist=True).save_pretrained(tmp_path, max_shard_size=size)
    opened = load(tmp_path, device_map=device_map)
    assert torch.equal(run(opened), run(model.to(opened.device)))  # "auto" takes an accelerator where there is one
    fly = load(dense_dirs["pixart"], device_map=device_map, quantization_config=QuantDMConfig(recipe=recipe))
    there = apply_recipe(load(dense_dirs["pixart"]).to(fly.device), recipe, insist=True)
    assert torch.equal(run(fly), run(there))


def test_the_size_of_an_automatic_device_map_is_that_of_the_packed_bytes(
    dense_dirs: dict[str, Path], tmp_path: Path
) -> None:
    model = load(dense_dirs["unet"])
    apply_recipe(model, uniform_config(model), insist=True).save_pretrained(tmp_path)
    sizes = {key: tensor.nbytes for key, tensor in model.state_dict().items()}
    room = 2 * sum(sizes.values())  # the dense model needs more
    assert room < sum(t.nbytes for t in load(dense_dirs["unet"]).state_dict().values())
    again = load(tmp_path, device_map="auto", max_memory={"cpu": room})
    assert torch.equal(run(again), run(model))


def test_auto_classes_of_both_libraries_open_exports(dense_dirs: dict[str, Path], tmp_path: Path) -> None:
    for name in MODELS:
        model = load(dense_dirs[name])
        apply_recipe(model, uniform_config(model), insist=True).save_pretrained(tmp_path / name)
        again = AutoModel.from_pretrained(str(tmp_path / name))
        assert type(again) is type(model)
        assert torch.equal(run(again), run(model))
    text = tiny_t5()
    apply_recipe(text, text_config(text), insist=True).save_pretrained(tmp_path / "text")
    ids = torch.arange(3, 13)[None]
    for auto in (transformers.AutoModelForTextEncoding, T5EncoderModel):
        again = auto.from_pretrained(tmp_path / "text", dtype=torch.float32)
        assert len(packed_layers(again)) == len(packed_layers(text))
        assert torch.equal(again(ids).last_hidden_state, text(ids).last_hidden_state)
    placed = T5EncoderModel.from_pretrained(tmp_path / "text", dtype=torch.float32, device_map="cpu")
    assert torch.equal(placed(ids).last_hidden_state, text(ids).last_hidden_state)


def tiny_t5() -> T5EncoderModel:
    """Build a tiny text encoder."""
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(vocab_size=50, d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16)).eval()


def text_config(model: nn.Module) -> QuantConfig:
    """Give every Linear of a text encoder the same scheme."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return QuantConfig.uniform(names, Scheme.parse("uniform-channel-4"))


def test_a_pipeline_config_quantizes_components_and_the_export_keeps_them(
    dense_dirs: dict[str, Path], tmp_path: Path
) -> None:
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    DiTPipeline(load(dense_dirs["dit"]), vae, DDIMScheduler()).save_pretrained(tmp_path / "dense")
    transformer = mixed_recipe(load(dense_dirs["dit"]))
    config = PipelineQuantizationConfig(quant_mapping={"transformer": QuantDMConfig(recipe=transformer)})
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "dense", quantization_config=config)
    pipe.save_pretrained(tmp_path / "small")
    again = DiffusionPipeline.from_pretrained(tmp_path / "small")
    assert torch.equal(run(again.transformer), run(pipe.transformer))
    assert len(packed_layers(again.transformer)) == len(packed_layers(pipe.transformer)) > 10


def test_a_dequantized_model_is_saved_as_if_it_had_never_been_quantized(
    dense_dirs: dict[str, Path], tmp_path: Path
) -> None:
    pipe = DDPMPipeline(load(dense_dirs["unet"]), DDPMScheduler())
    apply_recipe(pipe, uniform_config(pipe.unet), insist=True).save_pretrained(tmp_path / "small")
    again = DiffusionPipeline.from_pretrained(tmp_path / "small")
    again.unet.dequantize()
    again.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense/unet/config.json").read_text())
    assert not [key for key in config if "quant" in key]
    dense = load(tmp_path / "dense/unet")
    assert not packed_layers(dense)
    assert torch.equal(run(dense), run(pipe.unet))
    assert dense.to(torch.bfloat16).dtype == torch.bfloat16  # allowed again


FIRST = """
import sys, quantdm
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
import transformers.quantizers.auto as theirs
from diffusers import PipelineQuantizationConfig
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
PipelineQuantizationConfig(quant_backend="quantdm", quant_kwargs={"avg_bits": 4.0}, components_to_quantize=["unet"])
from quantdm.hub import QuantDMConfig, QuantDMHfQuantizer, QuantDMQuantizer
assert AUTO_QUANTIZER_MAPPING["quantdm"] is QuantDMQuantizer
assert theirs.AUTO_QUANTIZER_MAPPING["quantdm"] is QuantDMHfQuantizer
assert theirs.AUTO_QUANTIZATION_CONFIG_MAPPING["quantdm"] is QuantDMConfig
"""


def test_quantdm_is_known_to_libraries_that_are_imported_after_it() -> None:
    """The other order, and schedulers, stand in the tests of new processes."""
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
