"""Damaged exports and misfitting recipes end in one clear error, never in a model with random or missing weights."""

import json
import struct
from pathlib import Path

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
)
from safetensors.torch import save_file
from torch import nn

from quantdm.errors import QuantDMError
from quantdm.hub import QuantDMConfig, apply_recipe
from quantdm.modules import (
    activation_spec,
    set_activation_bits_,
)
from quantdm.recipe import ActivationSpec
from tests.hub_models import DTYPES, WEIGHTS, contents, load, mixed_recipe, run, save_dense, save_export, uniform_config


@pytest.fixture(scope="module")
def dense_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def export(dense_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_export(dense_dirs["dit"], tmp_path_factory.mktemp("export"))


@pytest.fixture
def damaged(export: Path, tmp_path: Path) -> Path:
    """Return a fresh copy of the export."""
    for file in export.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_what_cannot_be_done_to_a_quantized_model_says_so(export: Path, tmp_path: Path) -> None:
    model = DiTTransformer2DModel.from_pretrained(export)
    with pytest.raises(QuantDMError, match="already quantized"):
        apply_recipe(model, mixed_recipe(model))
    with pytest.raises(ValueError, match="Casting a quantized model"):
        model.to(torch.bfloat16)
    with pytest.raises(QuantDMError, match="leave safe_serialization=True"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    model.transformer_blocks[0].attn1.to_q = nn.Linear(32, 32)
    with pytest.raises(QuantDMError, match=r"wrapped after quantization, first transformer_blocks\.0\.attn1\.to_q"):
        model.save_pretrained(tmp_path)


def test_a_recipe_that_does_not_fit_leaves_the_model_as_it_was(dense_dirs: dict[str, Path]) -> None:
    model = load(dense_dirs["dit"])
    y, config = run(model), dict(model.config)
    other = mixed_recipe(load(dense_dirs["pixart"]))
    with pytest.raises(QuantDMError, match=r"recipe for tiny is for another model.*first transformer_blocks"):
        apply_recipe(model, other)
    recipe = mixed_recipe(model, ActivationSpec(bits=6, keep_8bit=("no_such_layer",)))
    with pytest.raises(QuantDMError, match="'no_such_layer' matches no layer"):
        apply_recipe(model, recipe)
    set_activation_bits_(model, ActivationSpec(bits=8))
    broken = model.proj_out_2.weight.data.clone()
    model.proj_out_2.weight.data[0, 0] = float("nan")
    with pytest.raises(QuantDMError, match=r"proj_out_2.*NaN"):
        apply_recipe(model, uniform_config(model))
    assert activation_spec(model) == ActivationSpec(bits=8)
    set_activation_bits_(model, None)
    model.proj_out_2.weight.data = broken
    assert torch.equal(run(model), y)
    assert dict(model.config) == config
    assert not hasattr(model, "hf_quantizer")
    with pytest.raises(QuantDMError, match="has no recipe"):
        load(dense_dirs["dit"], quantization_config=QuantDMConfig())
    with pytest.raises(QuantDMError, match="expected a Recipe or QuantConfig"):
        apply_recipe(model, dict(mixed_recipe(model).layers))  # type: ignore[arg-type]


def test_activations_set_before_quantizing_stay_and_are_saved(dense_dirs: dict[str, Path], tmp_path: Path) -> None:
    model = load(dense_dirs["dit"])
    set_activation_bits_(model, ActivationSpec(bits=8))
    apply_recipe(model, uniform_config(model)).save_pretrained(tmp_path)
    again = load(tmp_path)
    assert activation_spec(model) == activation_spec(again) == ActivationSpec(bits=8)
    assert torch.equal(run(again), run(model))


def edit_config(directory: Path, **changes: object) -> None:
    """Change the quantization_config of an export."""
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= changes
    (directory / "config.json").write_text(json.dumps(config))


def rewrite(directory: Path, header: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    """Replace the weights of an export."""
    save_file(tensors, directory / WEIGHTS, metadata=header)


Q, BIAS = "transformer_blocks.0.attn1.to_q.packed", "transformer_blocks.0.attn1.to_q.bias"
DAMAGES = {
    "packed tensor missing": (lambda t: t.pop(Q), "1 tensors are missing, first transformer_blocks"),
    "bias missing": (lambda t: t.pop(BIAS), "1 tensors are missing, first transformer_blocks"),
    "packed tensor renamed": (
        lambda t: t.update({"x.packed": t.pop(Q)}),
        "missing.*belong to no layer, first x.packed",
    ),
    "extra packed tensor": (lambda t: t.update({"x.packed": t[Q].clone()}), "belong to no layer, first x.packed"),
    "too few bytes": (lambda t: t.update({Q: t[Q][:-8].clone()}), "to_q.packed: got .* bytes, expected"),
    "other shape": (lambda t: t.update({Q: t[Q].view(-1, 2)}), "to_q.packed: got .* bytes, expected"),
    "signed bytes": (lambda t: t.update({Q: t[Q].view(torch.int8)}), "got torch.int8, expected torch.uint8"),
    "floats": (lambda t: t.update({Q: t[Q].float()}), "got torch.float32, expected torch.uint8"),
    "NaN in a scale": (lambda t: t[Q].view(torch.uint8)[:4].copy_(torch.tensor([0, 0, 192, 127])), "factor has NaN"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_damaged_tensors_are_one_clear_error(damage: str, dtype: torch.dtype, damaged: Path) -> None:
    change, message = DAMAGES[damage]
    header, tensors = contents(damaged / WEIGHTS)
    change(tensors)
    rewrite(damaged, header, tensors)
    with pytest.raises(QuantDMError, match=message):
        DiTTransformer2DModel.from_pretrained(damaged, dtype=dtype)


LAYER = "transformer_blocks.0.attn1.to_q"
TABLES = {
    "no table": (lambda h: h.pop("quantdm"), "its header has no layer table"),
    "not JSON": (lambda h: h.update(quantdm="{"), "table in its header is damaged"),
    "deeply nested": (lambda h: h.update(quantdm="[" * 100_000), "table in its header is damaged"),
    "other version": (lambda h: h.update(quantdm=h["quantdm"].replace('"version":1', '"version":7')), "got version 7"),
    "unknown key": (
        lambda h: h.update(quantdm=h["quantdm"].replace('"dtypes"', '"x":1,"dtypes"')),
        "table in its header is damaged",
    ),
    "wrong types": (
        lambda h: h.update(quantdm='{"version":1,"schemes":[],"dtypes":[],"layers":{"a":1}}'),
        "table in its header is damaged",
    ),
    "no layers": (
        lambda h: h.update(quantdm='{"version":1,"schemes":[],"dtypes":[],"layers":{}}'),
        "tensors are missing",
    ),
    "unknown scheme": (lambda h: h.update(quantdm=h["quantdm"].replace("uniform-channel-2", "magic-9")), "'magic-9'"),
    "unknown dtype": (lambda h: h.update(quantdm=h["quantdm"].replace('"float32"', '"int7"')), "got dtype 'int7'"),
    "other shape": (lambda h: h.update(quantdm=h["quantdm"].replace("[32,32]", "[32,33]")), "for another model"),
    "other layer": (lambda h: h.update(quantdm=h["quantdm"].replace(LAYER, "x.y")), "has no layer x.y"),
    "other scheme": (lambda h: h.update(quantdm=h["quantdm"].replace("-3", "-4")), "bytes, expected"),
    "split outside": (lambda h: h.update(quantdm=h["quantdm"].replace("[]]", "[4000]]")), r"got seams \[4000\]"),
    "index outside": (lambda h: h.update(quantdm=h["quantdm"].replace(":[0,0", ":[99,0")), "got scheme 99"),
}


@pytest.mark.parametrize("damage", TABLES)
def test_a_damaged_layer_table_is_one_clear_error(damage: str, damaged: Path) -> None:
    change, message = TABLES[damage]
    header, tensors = contents(damaged / WEIGHTS)
    change(header)
    rewrite(damaged, header, tensors)
    with pytest.raises(QuantDMError, match=message):
        DiTTransformer2DModel.from_pretrained(damaged)


def test_a_cut_file_a_flipped_header_or_another_config_version_is_one_clear_error(damaged: Path) -> None:
    whole = (damaged / WEIGHTS).read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    for broken in (whole[: len(whole) // 2], whole[:-1], whole[:100], whole[:8] + b"x" + whole[9:], whole[:8]):
        (damaged / WEIGHTS).write_bytes(broken)
        with pytest.raises((OSError, QuantDMError), match=r"Unable to load|damaged"):
            DiTTransformer2DModel.from_pretrained(damaged)
    assert header < len(whole)
    (damaged / WEIGHTS).write_bytes(whole)
    edit_config(damaged, version=2)
    with pytest.raises(QuantDMError, match="got version 2, expected 1"):
        DiTTransformer2DModel.from_pretrained(damaged)
    edit_config(damaged, version=1, activations={"bits": 7})
    with pytest.raises(QuantDMError, match=r"activations\.bits"):
        DiTTransformer2DModel.from_pretrained(damaged)
    edit_config(damaged, activations=None, future_key=1)  # a later quantdm may write more
    DiTTransformer2DModel.from_pretrained(damaged)


def test_a_dense_file_under_a_quantized_config_and_a_lost_shard_are_errors(
    damaged: Path, dense_dirs: dict[str, Path], tmp_path: Path
) -> None:
    model = DiTTransformer2DModel.from_pretrained(damaged)
    (damaged / WEIGHTS).write_bytes((dense_dirs["dit"] / WEIGHTS).read_bytes())
    with pytest.raises(QuantDMError, match="no layer table"):
        DiTTransformer2DModel.from_pretrained(damaged)
    shards = tmp_path / "shards"
    model.save_pretrained(shards, max_shard_size="20KB")
    first, second = sorted(shards.glob("*-0000[12]-*.safetensors"))
    header, tensors = contents(second)
    header["quantdm"] = header["quantdm"].replace("uniform-channel-2", "uniform-channel-3")
    save_file(tensors, second, metadata=header)
    with pytest.raises(QuantDMError, match="its layer table differs"):
        DiTTransformer2DModel.from_pretrained(shards)
    header, tensors = contents(first)
    save_file(tensors, second, metadata=header)  # the index promises tensors that the second file no longer has
    with pytest.raises(QuantDMError, match="tensors are missing"):
        DiTTransformer2DModel.from_pretrained(shards)
