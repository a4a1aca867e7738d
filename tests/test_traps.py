"""The traps of diffusers, transformers, PEFT and accelerate that a quantized model meets; each has its test.

Those of other files:
- packed weights in buffers stay behind under sequential offload: test_offload.py, `test_sequential_offload_takes_...`
- PEFT takes subclasses of Linear and Conv only; fusing a LoRA adds into `.weight`: test_lora.py
- further damages of a checkpoint: test_hub_errors.py; further views of the weight: test_modules.py
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate.utils import compute_module_sizes
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel

import quantdm
from quantdm.errors import QuantDMError
from quantdm.hub import QuantDMConfig, apply_recipe
from quantdm.modules import QuantConv2d, QuantLinear, packed_layers
from quantdm.recipe import Recipe
from tests.family_models import FAMILIES, answer, make, open_
from tests.hub_models import WEIGHTS, contents, equal_files, mixed_recipe, uniform_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a quantized denoiser."""
    directory = tmp_path_factory.mktemp("export")
    model = make("sd-1.5")
    apply_recipe(model, mixed_recipe(model), insist=True).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a quantized text encoder."""
    directory = tmp_path_factory.mktemp("text")
    quantized_clip().save_pretrained(directory)
    return directory


def quantized_clip() -> nn.Module:
    model = make("clip")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return apply_recipe(model, Recipe(model="clip", layers=dict.fromkeys(names, "kmeans-channel-4")), insist=True)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("family", ["sd-1.5", "clip"])
def test_bytes_and_outputs_survive_loading_in_any_dtype(
    family: str, dtype: torch.dtype, export: Path, text_encoder: Path, tmp_path: Path
) -> None:
    directory = export if family == "sd-1.5" else text_encoder
    stored = load_file(next(directory.glob("*.safetensors")))
    model = open_(directory, dtype)
    packed = packed_layers(model)
    for name, layer in packed.items():
        assert torch.equal(layer.packed, stored[f"{name}.packed"])
        assert layer.weight.dtype == dtype
    y = answer(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(open_(tmp_path, dtype)), y)
    again = load_file(next(tmp_path.glob("*.safetensors")))
    assert all(torch.equal(again[f"{name}.packed"], stored[f"{name}.packed"]) for name in packed)


def test_packed_weights_are_frozen_plain_parameters(export: Path, text_encoder: Path) -> None:
    for directory in (export, text_encoder):
        model = open_(directory)
        for layer in packed_layers(model).values():
            assert isinstance(layer, (QuantLinear, QuantConv2d))
            assert isinstance(layer, (nn.Linear, nn.Conv2d))
            assert set(dict(layer.named_parameters())) == {"packed"} | ({"bias"} if layer.bias is not None else set())
            assert not dict(layer.named_buffers())
            assert type(layer.packed) is nn.Parameter
            assert type(layer.packed.data) is torch.Tensor
            assert layer.packed.dtype == torch.uint8
            assert not layer.packed.requires_grad


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_a_missing_packed_tensor_is_an_error(library: str, export: Path, text_encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(export if library == "diffusers" else text_encoder, tmp_path / "export")
    file = next((tmp_path / "export").glob("*.safetensors"))
    header, tensors = contents(file)
    tensors.pop(next(key for key in tensors if key.endswith(".packed")))
    save_file(tensors, file, metadata=header)
    with pytest.raises(QuantDMError, match=r"layer table|not in the checkpoint"):
        open_(tmp_path / "export")


BARE = """
import sys, warnings; warnings.simplefilter("ignore")
from transformers import CLIPTextModel, logging
logging.set_verbosity(50)
try:
    model = CLIPTextModel.from_pretrained(sys.argv[1])
    print("random" if type(model.get_submodule(sys.argv[2])).__name__ == "Linear" else "packed")
except Exception as error:
    print(type(error).__name__)
"""


def test_a_component_that_lost_its_config_is_an_error(tmp_path: Path) -> None:
    pipe = quantdm.load_pipeline("digits-sd")
    encoder: nn.Module = pipe.text_encoder
    names = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    apply_recipe(encoder, Recipe(model="clip", layers=dict.fromkeys(names, "kmeans-channel-4")), insist=True)
    y = answer(encoder)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(answer(quantdm.load_pipeline(tmp_path).text_encoder), y)
    folder = tmp_path / "text_encoder"
    # What happens without the plug-in: transformers warns, and answers with random weights.
    found = subprocess.run(
        [sys.executable, "-c", BARE, str(folder), names[0]], capture_output=True, text=True, timeout=300
    )
    assert found.stdout.strip() == "random", found.stderr
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]  # so that the plug-in cannot notice either
    (folder / "config.json").write_text(json.dumps(config))
    assert not packed_layers(CLIPTextModel.from_pretrained(folder))
    with pytest.raises(QuantDMError, match="text_encoder"):
        quantdm.load_pipeline(tmp_path)


@pytest.mark.parametrize("family", ["sd-1.5", "sd3", "flux"])
def test_a_dense_single_file_is_quantized_on_the_fly(family: str, export: Path, tmp_path: Path) -> None:
    model = make(family)
    model.save_pretrained(tmp_path / "dense")
    recipe = mixed_recipe(model)
    y = answer(apply_recipe(model, recipe, insist=True))
    cls = getattr(diffusers, FAMILIES[family][0])
    single = cls.from_single_file(
        str(tmp_path / "dense" / WEIGHTS),
        config=str(tmp_path / "dense"),
        quantization_config=QuantDMConfig(recipe=recipe),
    )
    assert torch.equal(answer(single), y)
    single.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "applied")
    assert equal_files(tmp_path / "single" / WEIGHTS, tmp_path / "applied" / WEIGHTS)
    assert torch.equal(answer(open_(tmp_path / "single")), y)


def test_an_export_is_not_taken_for_a_dense_single_file(export: Path) -> None:
    cls = getattr(diffusers, FAMILIES["sd-1.5"][0])
    with pytest.raises(QuantDMError, match="open its directory with from_pretrained"):
        cls.from_single_file(
            str(export / WEIGHTS),
            config=str(export),
            quantization_config=QuantDMConfig(recipe=uniform_config(make("sd-1.5"))),
        )


CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "to with a device": lambda model: model.to("cpu", torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "there and back": lambda model: model.half().float().to(dtype=torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("family", ["sd-1.5", "clip"])
def test_a_cast_does_what_loading_in_that_dtype_does(
    family: str, cast: str, export: Path, text_encoder: Path, tmp_path: Path
) -> None:
    directory = export if family == "sd-1.5" else text_encoder
    model = open_(directory, torch.bfloat16 if cast == "there and back" else torch.float32)
    stored = {name: layer.packed.clone() for name, layer in packed_layers(model).items()}
    CASTS[cast](model)
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(layer.packed, stored[name]) for name, layer in packed_layers(model).items())
    y = answer(model)
    if cast != "there and back":  # float16 rounds what is not packed
        assert torch.equal(y, answer(open_(directory, torch.bfloat16)))
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(open_(tmp_path, torch.bfloat16)), y)


@pytest.mark.parametrize("family", ["sd-1.5", "clip"])
def test_a_dequantized_model_is_saved_as_an_ordinary_one(
    family: str, export: Path, text_encoder: Path, tmp_path: Path
) -> None:
    model = open_(export if family == "sd-1.5" else text_encoder)
    y = answer(model)
    model.dequantize()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    header, tensors = contents(next(tmp_path.glob("*.safetensors")))
    assert "quantdm" not in header
    assert not any(key.endswith(".packed") for key in tensors)
    dense = open_(tmp_path)
    assert not packed_layers(dense)
    assert torch.equal(answer(dense), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_device_map_counts_the_packed_bytes(dtype: torch.dtype, export: Path, tmp_path: Path) -> None:
    model = open_(export, dtype)
    true = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert compute_module_sizes(model, dtype=dtype)[""] == true
    dense = sum(parameter.nbytes for parameter in make("sd-1.5").to(dtype).parameters())
    room = int(1.2 * true)
    assert room < dense
    cls = getattr(diffusers, FAMILIES["sd-1.5"][0])
    fits = cls.from_pretrained(export, torch_dtype=dtype, device_map="auto", max_memory={"cpu": room})
    assert set(fits.hf_device_map.values()) == {"cpu"}
    assert torch.equal(answer(fits), answer(model))


def test_the_weight_answers_dtype_and_device_under_every_attention_processor(export: Path) -> None:
    model = open_(export, torch.bfloat16)
    asked = [module for name, module in packed_layers(model).items() if name.endswith("to_q")]
    assert asked
    assert all((layer.weight.dtype, layer.weight.device.type) == (torch.bfloat16, "cpu") for layer in asked)
    y = answer(model)
    for processor in (diffusers.models.attention_processor.AttnProcessor2_0(),):
        model.set_attn_processor(processor)
        assert torch.equal(answer(model), y)
    for family in ("t5", "clip"):  # T5 casts to `wo.weight.dtype`
        assert torch.isfinite(answer(open_quantized(family))).all()


def open_quantized(family: str) -> nn.Module:
    model = make(family).bfloat16()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return apply_recipe(model, Recipe(model=family, layers=dict.fromkeys(names, "uniform-channel-4")), insist=True)
