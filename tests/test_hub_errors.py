"""Damaged exports and misfitting recipes end in one clear error, never in a model with random or missing weights."""

import re
import struct
from pathlib import Path

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
)
from safetensors.torch import save_file
from torch import nn

from quantdm.activations import activation_spec, set_activation_bits_
from quantdm.errors import QuantDMError
from quantdm.hub import QuantDMConfig, apply_recipe
from quantdm.recipe import ActivationSpec
from tests.forge import edit_file, edit_json, sign
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
        apply_recipe(model, mixed_recipe(model), insist=True)
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
        apply_recipe(model, other, insist=True)
    recipe = mixed_recipe(model, ActivationSpec(bits=6, keep_8bit=("no_such_layer",)))
    with pytest.raises(QuantDMError, match="no_such_layer"):
        apply_recipe(model, recipe, insist=True)
    set_activation_bits_(model, ActivationSpec(bits=8))
    broken = model.proj_out_2.weight.data.clone()
    model.proj_out_2.weight.data[0, 0] = float("nan")
    with pytest.raises(QuantDMError, match=r"proj_out_2.*NaN"):
        apply_recipe(model, uniform_config(model), insist=True)
    assert activation_spec(model) == ActivationSpec(bits=8)
    set_activation_bits_(model, None)
    model.proj_out_2.weight.data = broken
    assert torch.equal(run(model), y)
    assert dict(model.config) == config
    assert not hasattr(model, "hf_quantizer")
    with pytest.raises(QuantDMError, match="has no recipe"):
        load(dense_dirs["dit"], quantization_config=QuantDMConfig())
    with pytest.raises(QuantDMError, match="expected a Recipe or QuantConfig"):
        apply_recipe(model, dict(mixed_recipe(model).layers), insist=True)  # type: ignore[arg-type]


def test_activations_set_before_quantizing_stay_and_are_saved(dense_dirs: dict[str, Path], tmp_path: Path) -> None:
    model = load(dense_dirs["dit"])
    set_activation_bits_(model, ActivationSpec(bits=8))
    apply_recipe(model, uniform_config(model), insist=True).save_pretrained(tmp_path)
    again = load(tmp_path)
    assert activation_spec(model) == activation_spec(again) == ActivationSpec(bits=8)
    assert torch.equal(run(again), run(model))


def edit_config(directory: Path, **changes: object) -> None:
    """Change the quantization_config of an export."""
    edit_json(directory / "config.json", lambda config: config["quantization_config"].update(changes))


LAYER = "transformer_blocks.0.attn1.to_q"
Q, BIAS = f"{LAYER}.packed", f"{LAYER}.bias"
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
def test_tensors_that_do_not_fit_are_one_clear_error(damage: str, dtype: torch.dtype, damaged: Path) -> None:
    change, message = DAMAGES[damage]
    edit_file(damaged / WEIGHTS, lambda _, tensors: change(tensors))
    accident = message if "missing" in message or "no layer" in message else rf"{WEIGHTS}: .* layer .*to_q is not what"
    with pytest.raises(QuantDMError, match=accident):
        DiTTransformer2DModel.from_pretrained(damaged, dtype=dtype)
    edit_file(damaged / WEIGHTS, sign)
    with pytest.raises(QuantDMError, match=message):
        DiTTransformer2DModel.from_pretrained(damaged, dtype=dtype)


def flip(tensor: torch.Tensor) -> None:
    """Flip the lowest bit of a tensor's last byte."""
    tensor.view(torch.uint8)[-1] ^= 1


@pytest.mark.parametrize("size", ["10GB", "20KB"], ids=["one file", "shards"])
def test_a_flipped_bit_names_its_file_and_its_layer(size: str, export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    DiTTransformer2DModel.from_pretrained(export).save_pretrained(folder, max_shard_size=size)
    for name, called in ((Q, f"the packed weight of layer {LAYER}"), (BIAS, BIAS)):
        path = next(path for path in folder.glob("*.safetensors") if name in contents(path)[1])
        good = path.read_bytes()
        edit_file(path, lambda _, tensors, name=name: flip(tensors[name]))
        with pytest.raises(QuantDMError, match=rf"{path}: {called} is not what was saved \(checksum\)"):
            DiTTransformer2DModel.from_pretrained(folder, dtype=torch.bfloat16)
        path.write_bytes(good)
    assert torch.equal(run(load(folder)), run(load(export)))


TABLES = {
    "no table": (lambda h: h.pop("quantdm"), "its header has no layer table"),
    "not JSON": (lambda h: h.update(quantdm="{"), "table in its header is damaged"),
    "deeply nested": (lambda h: h.update(quantdm="[" * 100_000), "table in its header is damaged"),
    "other version": (lambda h: h.update(quantdm=h["quantdm"].replace('"version":2', '"version":7')), "got version 7"),
    "unknown key": (
        lambda h: h.update(quantdm=h["quantdm"].replace('"dtypes"', '"x":1,"dtypes"')),
        "table in its header is damaged",
    ),
    "wrong types": (
        lambda h: h.update(quantdm='{"version":2,"schemes":[],"dtypes":[],"layers":{"a":1}}'),
        "table in its header is damaged",
    ),
    "no layers": (
        lambda h: h.update(
            quantdm='{"version":2,"schemes":[],"dtypes":[],"layers":{},"packed":"","others":"","crc32":0}'
        ),
        "tensors are missing",
    ),
    "unknown scheme": (lambda h: h.update(quantdm=h["quantdm"].replace("uniform-channel-2", "magic-9")), "'magic-9'"),
    "unknown dtype": (lambda h: h.update(quantdm=h["quantdm"].replace('"float32"', '"int7"')), "got dtype 'int7'"),
    "other shape": (lambda h: h.update(quantdm=h["quantdm"].replace("[32,32]", "[32,33]")), "for another model"),
    "other layer": (lambda h: h.update(quantdm=h["quantdm"].replace(LAYER, "x.y")), "has no layer x.y"),
    "other scheme": (lambda h: h.update(quantdm=h["quantdm"].replace("-3", "-4")), "bytes, expected"),
    "split outside": (lambda h: h.update(quantdm=h["quantdm"].replace(",[]]", ",[4000]]")), r"got seams \[4000\]"),
    "index outside": (lambda h: h.update(quantdm=h["quantdm"].replace(":[0,0", ":[99,0")), "got scheme 99"),
    "too few checksums": (
        lambda h: h.update(quantdm=re.sub(r'"others":".{16}', '"others":"', h["quantdm"])),
        "tensors that are not quantized, expected",
    ),
    "checksums of no layer": (
        lambda h: h.update(quantdm=re.sub(r'"layers":{.*},"packed"', '"layers":{},"packed"', h["quantdm"])),
        r"layer table in its header is damaged \(\d+ checksums for 0 layers",
    ),
    "checksums not base64": (
        lambda h: h.update(quantdm=h["quantdm"].replace('"others":"', '"others":"?')),
        "table in its header is damaged",
    ),
}


@pytest.mark.parametrize("damage", TABLES)
def test_a_layer_table_that_does_not_fit_is_one_clear_error(damage: str, damaged: Path) -> None:
    change, message = TABLES[damage]
    edit_file(damaged / WEIGHTS, lambda header, _: change(header))
    early = any(word in message for word in ("table", "version"))
    with pytest.raises(QuantDMError, match=message if early else "is not the one that was saved"):
        DiTTransformer2DModel.from_pretrained(damaged)
    if not early:
        edit_file(damaged / WEIGHTS, sign)
        with pytest.raises(QuantDMError, match=message):
            DiTTransformer2DModel.from_pretrained(damaged)


def test_a_cut_file_a_flipped_header_or_another_config_version_is_one_clear_error(damaged: Path) -> None:
    whole = (damaged / WEIGHTS).read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    for broken in (whole[: len(whole) // 2], whole[:-1], whole[:100], whole[:8] + b"x" + whole[9:], whole[:8]):
        (damaged / WEIGHTS).write_bytes(broken)
        with pytest.raises((OSError, QuantDMError)):  # diffusers reads it first, in words of its own
            DiTTransformer2DModel.from_pretrained(damaged)
    assert header < len(whole)
    (damaged / WEIGHTS).write_bytes(whole)
    edit_config(damaged, version=1)
    with pytest.raises(QuantDMError, match="got version 1, expected 2"):
        DiTTransformer2DModel.from_pretrained(damaged)
    edit_config(damaged, version=2, activations={"bits": 7})
    with pytest.raises(QuantDMError, match=r"activations: bits: got 7"):
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
    save_file(tensors, second, metadata=header)
    with pytest.raises(QuantDMError, match=f"lies in {first.name} too"):
        DiTTransformer2DModel.from_pretrained(shards)
    save_file({}, second, metadata=header)  # the index promises tensors that the second file no longer has
    with pytest.raises(QuantDMError, match="tensors are missing"):
        DiTTransformer2DModel.from_pretrained(shards)
