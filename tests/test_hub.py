"""Apply, save and load through diffusers and transformers: really packed and bit-exact."""

import json
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    PipelineQuantizationConfig,
    UNet2DConditionModel,
)
from diffusers.hooks import apply_group_offloading
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from quantdm.activations import activation_spec, set_activation_bits_, usual_activations
from quantdm.denoisers.inventory import list_layers
from quantdm.errors import QuantDMError
from quantdm.hub import QuantDMConfig, QuantDMQuantizer, apply_recipe, register
from quantdm.hub.quantize import average_bits
from quantdm.modules import dense_weights, packed_layers
from quantdm.quantizers import count_bits, quantize_weight
from quantdm.recipe import ActivationSpec, Recipe
from quantdm.schemes import Scheme
from tests.hub_models import (
    DTYPES,
    MIXED,
    MODELS,
    WEIGHTS,
    contents,
    equal_files,
    load,
    mixed_recipe,
    run,
    save_dense,
    save_export,
    uniform_config,
)


@pytest.fixture(scope="module")
def dense_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def export(dense_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_export(dense_dirs["dit"], tmp_path_factory.mktemp("export"))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_opens_bit_by_bit_the_same(
    name: str, dtype: torch.dtype, dense_dirs: dict[str, Path], tmp_path: Path
) -> None:
    model = load(dense_dirs[name], dtype=dtype)
    activations = usual_activations(model, 6)
    recipe = mixed_recipe(model, activations)
    assert apply_recipe(model, recipe, insist=True) is model
    y = run(model)
    assert torch.isfinite(y).all()

    model.save_pretrained(tmp_path / "whole")
    whole = load(tmp_path / "whole", dtype=dtype)
    assert torch.equal(run(whole), y)
    assert activation_spec(whole) == activations
    whole.save_pretrained(tmp_path / "again")
    assert equal_files(tmp_path / "whole" / WEIGHTS, tmp_path / "again" / WEIGHTS)

    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(run(load(tmp_path / "shards", dtype=dtype)), y)

    with dense_weights(whole):
        assert torch.equal(run(whole), y)
    assert whole.dequantize() is whole
    assert not packed_layers(whole)
    assert activation_spec(whole) is None
    whole.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    dense = load(tmp_path / "dense", dtype=dtype)
    set_activation_bits_(dense, activations)
    assert torch.equal(run(dense), y)

    fly = load(dense_dirs[name], dtype=dtype, quantization_config=QuantDMConfig(recipe=recipe))
    assert torch.equal(run(fly), y)
    fly.save_pretrained(tmp_path / "fly")
    assert equal_files(tmp_path / "fly" / WEIGHTS, tmp_path / "whole" / WEIGHTS)


def test_bytes_are_the_same_whatever_dtype_they_are_loaded_in(export: Path) -> None:
    wide, narrow = (DiTTransformer2DModel.from_pretrained(export, dtype=dtype) for dtype in DTYPES.values())
    for name, layer in packed_layers(wide).items():
        other = packed_layers(narrow)[name]
        assert torch.equal(layer.packed, other.packed)
        assert (layer.weight.dtype, other.weight.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(layer.quantized.dequantize(dtype=torch.bfloat16), other.dequantize())
    # Integers are invisible to `model.dtype`, which pipelines cast latents to; fp16 scales would not be.
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)


FRESH = """
import sys, torch, quantdm
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
for directory, dtype in zip(sys.argv[1:], (torch.float32, torch.bfloat16)):
    pipe = DiffusionPipeline.from_pretrained(directory, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    images = pipe([1, 2], generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    torch.save(torch.from_numpy(images), directory + "/images.pt")
"""


def test_pipelines_make_the_same_images_in_a_new_process(dense_dirs: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    stock = DiTPipeline(DiTTransformer2DModel.from_pretrained(dense_dirs["dit"]), vae, DDIMScheduler())
    stock.save_pretrained(tmp_path / "stock")
    expected = {}
    for name, dtype in DTYPES.items():
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "stock", dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        assert apply_recipe(pipe, mixed_recipe(pipe.transformer, ActivationSpec(bits=8)), insist=True) is pipe
        pipe.save_pretrained(tmp_path / name)
        generator = torch.Generator().manual_seed(0)
        images = pipe([1, 2], generator=generator, num_inference_steps=2, output_type="np").images
        expected[name] = torch.from_numpy(images)
    arguments = [str(tmp_path / name) for name in DTYPES]
    subprocess.run([sys.executable, "-c", FRESH, *arguments], check=True, timeout=500)
    for name, images in expected.items():
        assert torch.equal(torch.load(tmp_path / name / "images.pt", weights_only=True), images)


@pytest.mark.parametrize("label", ["uniform-channel-3", "kmeans-channel-3", "kmeans-tensor-2"])
def test_the_file_is_at_most_2_percent_larger_than_its_counted_bits(label: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    # The shape of the embedded U-Net: real models are larger, so the headers weigh less there.
    model = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 160),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=160,
        attention_head_dim=5,
    ).bfloat16()
    records = list_layers(model)
    rest = sum(p.nbytes for p in model.parameters()) - 2 * sum(record.num_weights for record in records)
    bits = sum(count_bits(record.shape, Scheme.parse(label), record.split) for record in records)
    apply_recipe(model, uniform_config(model, label), insist=True).save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_size <= 1.02 * (bits / 8 + rest)
    assert (tmp_path / "config.json").stat().st_size < 3000  # the table of layers is not in there


def test_the_header_says_how_every_layer_was_quantized(dense_dirs: dict[str, Path], tmp_path: Path) -> None:
    model = load(dense_dirs["unet"])
    recipe = mixed_recipe(model)
    apply_recipe(model, recipe, insist=True).save_pretrained(tmp_path)
    header, tensors = contents(tmp_path / WEIGHTS)
    table = json.loads(header["quantdm"])
    schemes, dtypes, layers = table["schemes"], table["dtypes"], table["layers"]
    assert {name: (schemes[s], dtypes[d], shape, seams) for name, (s, d, shape, seams) in layers.items()} == {
        record.name: (recipe.layers[record.name], "float32", list(record.shape), [record.split] if record.split else [])
        for record in list_layers(model)
        if recipe.layers[record.name] is not None
    }
    assert any(entry[3] for entry in layers.values())
    assert {key for key in tensors if key.endswith(".packed")} == {f"{name}.packed" for name in layers}
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config.pop("avg_bits") == pytest.approx(average_bits(list_layers(model), recipe.config), abs=1e-6)
    assert config == {"quant_method": "quantdm", "version": 2, "model": "tiny"}


def test_weights_come_from_a_bank_when_there_is_one(dense_dirs: dict[str, Path]) -> None:
    model, other = (load(dense_dirs["unet"]) for _ in range(2))

    class Bank:
        def get(self, layer_name: str, scheme: Scheme):
            record = next(record for record in list_layers(model) if record.name == layer_name)
            weight = other.get_submodule(layer_name).weight
            return quantize_weight(weight, scheme, split=record.split, name=layer_name)

        def other(self, parameter_name: str) -> torch.Tensor | None:
            return 2 * other.conv_out.bias.detach() if parameter_name == "conv_out.bias" else None

    config = uniform_config(model, "uniform-tensor-4")
    apply_recipe(model, config, bank=Bank(), insist=True)
    assert torch.equal(model.conv_out.bias, 2 * other.conv_out.bias)
    model.conv_out.bias.data = other.conv_out.bias.detach()
    assert torch.equal(run(model), run(apply_recipe(load(dense_dirs["unet"]), config, insist=True)))

    class Unsplit(Bank):
        def get(self, layer_name: str, scheme: Scheme):
            return quantize_weight(other.get_submodule(layer_name).weight, scheme, name=layer_name)

    with pytest.raises(QuantDMError, match=r"up_blocks.*the bank gave"):
        apply_recipe(other, config, bank=Unsplit(), insist=True)
    assert not packed_layers(other)


def test_a_recipe_file_is_taken_too(dense_dirs: dict[str, Path], tmp_path: Path) -> None:
    model, other = (load(dense_dirs["dit"]) for _ in range(2))
    recipe = mixed_recipe(model, ActivationSpec(bits=8))
    path = recipe.save(tmp_path / "recipe.yaml")
    assert torch.equal(run(apply_recipe(model, recipe, insist=True)), run(apply_recipe(other, path, insist=True)))


def test_both_forms_of_a_pipeline_quantization_config_quantize_on_the_fly(
    dense_dirs: dict[str, Path], tmp_path: Path
) -> None:
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    model = DiTTransformer2DModel.from_pretrained(dense_dirs["dit"])
    DiTPipeline(model, vae, DDIMScheduler()).save_pretrained(tmp_path)
    recipe = mixed_recipe(model)
    y = run(apply_recipe(model, recipe, insist=True))
    for config in (
        PipelineQuantizationConfig(quant_mapping={"transformer": QuantDMConfig(recipe=recipe)}),
        PipelineQuantizationConfig(
            quant_backend="quantdm", quant_kwargs={"recipe": recipe}, components_to_quantize=["transformer"]
        ),
    ):
        pipe = DiffusionPipeline.from_pretrained(tmp_path, quantization_config=config)
        assert torch.equal(run(pipe.transformer), y)


def test_registering_twice_changes_nothing() -> None:
    register()
    before = dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)
    register()
    assert (dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)) == before
    assert AUTO_QUANTIZER_MAPPING["quantdm"] is QuantDMQuantizer


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (CLIPTextModel, CLIPTextConfig),
        (
            T5EncoderModel,
            lambda **sizes: T5Config(vocab_size=50, d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16),
        ),
    ],
    ids=["clip", "t5"],
)
def test_text_encoders_are_quantized_saved_and_loaded_alike(cls, config, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    cls(config(num_hidden_layers=2, num_attention_heads=2, **sizes)).save_pretrained(tmp_path / "dense")
    model = cls.from_pretrained(tmp_path / "dense", dtype=dtype)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    recipe = Recipe(model="text", layers=dict(zip(names, cycle(MIXED), strict=False)))
    apply_recipe(model, recipe, insist=True)
    ids = torch.arange(3, 13)[None]
    y = model(ids).last_hidden_state
    model.save_pretrained(tmp_path / "small")
    again = cls.from_pretrained(tmp_path / "small", dtype=dtype)
    assert len(packed_layers(again)) == sum(label is not None for label in recipe.layers.values())
    assert torch.equal(again(ids).last_hidden_state, y)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert torch.equal(cls.from_pretrained(tmp_path / "shards", dtype=dtype)(ids).last_hidden_state, y)
    fly = cls.from_pretrained(tmp_path / "dense", dtype=dtype, quantization_config=QuantDMConfig(recipe=recipe))
    assert torch.equal(fly(ids).last_hidden_state, y)
    again.dequantize()
    again.save_pretrained(tmp_path / "back")
    assert torch.equal(cls.from_pretrained(tmp_path / "back", dtype=dtype)(ids).last_hidden_state, y)
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    header, tensors = contents(tmp_path / "small/model.safetensors")
    lost = next(key for key in tensors if not key.endswith(".packed"))
    for key in (next(key for key in tensors if key.endswith(".packed")), lost):
        rest = {k: v for k, v in tensors.items() if k != key}
        save_file(rest, tmp_path / "small/model.safetensors", metadata=header)
        with pytest.raises(QuantDMError, match="does not fit its layer table"):
            cls.from_pretrained(tmp_path / "small")
        save_file(rest | {f"other.{key}": tensors[key]}, tmp_path / "small/model.safetensors", metadata=header)
        if key.endswith(".packed"):
            with pytest.raises(QuantDMError, match="was not in the checkpoint"):
                cls.from_pretrained(tmp_path / "small")


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
def test_offload_device_maps_and_compile_leave_the_output_as_it_is(export: Path, tmp_path: Path) -> None:
    y = run(load(export))
    grouped = load(export)
    cpu = torch.device("cpu")
    apply_group_offloading(grouped, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.equal(run(grouped), y)
    sequential = load(export)
    accelerate.cpu_offload(sequential, cpu)
    assert torch.equal(run(sequential), y)
    assert torch.equal(run(load(export, device_map={"": "cpu"})), y)
    # diffusers casts floating tensors on their way to the disk: bytes stay bytes
    narrow = run(load(export, dtype=torch.bfloat16))
    disk = load(export, dtype=torch.bfloat16, device_map={"": "disk"}, offload_folder=str(tmp_path / "disk"))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, 4, 8, 8, generator=generator).bfloat16()
        out = disk(x, timestep=torch.tensor([10, 500]), class_labels=torch.tensor([1, 2]), return_dict=False)[0]
    assert torch.equal(out, narrow)
    assert torch.equal(run(torch.compile(load(export), fullgraph=True, backend="aot_eager")), y)
