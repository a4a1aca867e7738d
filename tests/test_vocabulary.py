"""Schemes, configs, recipes and files: round trips, and one clear error for bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from quantdm import QuantConfig, QuantDMError, Recipe, Scheme, load_recipe
from quantdm.files import atomic_path, digest, load_tensors, read_json, save_tensors, write_json
from quantdm.recipe import check_layers

schemes = st.builds(
    lambda method, bits, group, table, flag, p, calibration: Scheme(
        method=method, bits=bits, granularity="group" if isinstance(group, int) else group,
        group_size=group if isinstance(group, int) else None, table=table if method == "kmeans" else None,
        symmetric=flag and method == "uniform", half_steps=flag and method == "log2",
        p=p if method != "kmeans" and calibration is None else 2.4, calibration=calibration,
    ),
    st.sampled_from(["uniform", "kmeans", "log2"]),
    st.integers(2, 8),
    st.sampled_from(["tensor", "channel", 32, 64, 100]),
    st.sampled_from([None, "int8", "fp16"]),
    st.booleans(),
    st.sampled_from([2, 2.4]),
    st.sampled_from([None, "importance", "feedback"]),
) | st.builds(
    lambda bits, size, calibration: Scheme(
        method="kmeans", bits=bits, granularity="shared", group_size=size, calibration=calibration
    ),
    st.integers(2, 8),
    st.sampled_from([None, 32, 64, 128]),
    st.sampled_from([None, "importance", "feedback"]),
)  # fmt: skip
schemes |= st.builds(lambda scheme, rank: scheme.model_copy(update={"lowrank": rank}), schemes, st.integers(1, 300))


@given(schemes, st.none() | st.integers(1, 300), st.booleans())
def test_a_scheme_is_its_label(scheme, lora, wide):
    assert Scheme.parse(scheme.label) == scheme
    fused = scheme.model_copy(update={"lora": lora, "wide": wide and lora is not None})
    assert Scheme.parse(fused.label) == fused
    assert fused.without_branches == scheme.without_branches


@pytest.mark.parametrize(
    "label",
    [
        "kmeans-channel-1",
        "kmeans-channel-9",
        "kmeans-channel-4-fp32",
        "uniform-channel-4-int8",
        "kmean-channel-4",
        "uniform-4",
        "",
        "uniform-group-4",
        "uniform-channel32-4",
    ],
)
def test_a_wrong_label_says_what_was_expected(label):
    with pytest.raises(QuantDMError, match="scheme"):
        Scheme.parse(label)


@pytest.mark.parametrize("bits", [1, 9, 0, -4])
def test_bits_outside_2_to_8_are_refused(bits):
    with pytest.raises(ValidationError, match="expected 2 to 8"):
        Scheme(method="uniform", bits=bits)


@given(st.dictionaries(st.text(min_size=1), st.none() | schemes, max_size=8))
def test_a_recipe_survives_its_file(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe = Recipe(model="m", layers=QuantConfig(config).to_labels())
    recipe.save(path)
    assert load_recipe(path) == recipe
    assert dict(load_recipe(path).config) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("version: 1\nmodel: m\nlayers: {a: kmeans-channel-4}\nbogus: 1\n", "bogus"),
        ("version: 2\nmodel: m\nlayers: {}\n", "version"),
        ("version: 1\nmodel: m\nlayers: {a: kmeans-channel-99}\n", "99 bits"),
        ("version: 1\nmodel: m\n", "layers"),
        ("- just\n- a list\n", "list"),
        ("a: [unclosed\n", "not YAML"),
        ("model: !!python/object/apply:os.system ['true']\n", "not YAML"),
    ],
)
def test_a_bad_recipe_names_the_key(tmp_path, text, expected):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(QuantDMError, match=expected):
        load_recipe(path)


def test_a_recipe_for_another_model_names_the_first_layers_that_differ():
    config = QuantConfig.from_labels({"a": "kmeans-channel-4", "old": None})
    with pytest.raises(QuantDMError, match=r"first old.*first new"):
        check_layers(config, ["a", "new"])


def test_a_failed_write_leaves_nothing_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"version": 1})
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text(str(1 / 0))
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"version": float("nan")})
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]
    assert read_json(path, version=1) == {"version": 1}


def test_records_of_another_version_are_refused(tmp_path):
    write_json(tmp_path / "r.json", {"version": 7})
    with pytest.raises(QuantDMError, match="got version 7, expected 1"):
        read_json(tmp_path / "r.json", version=1)


def test_tensors_survive_their_file_and_a_truncated_one_is_an_error(tmp_path):
    path = tmp_path / "t.safetensors"
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.uint8)}
    save_tensors(path, tensors, {"layer": "x"})
    loaded, metadata = load_tensors(path)
    assert metadata == {"layer": "x"}
    assert all(torch.equal(loaded[k], tensors[k]) for k in tensors)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(QuantDMError, match="damaged"):
        load_tensors(path)


def test_a_digest_depends_on_every_bit_of_a_tensor():
    a = torch.zeros(8)
    b = a.clone()
    b[3] = -0.0  # equal value, other bits
    assert digest(a) != digest(b)
    assert digest(a) == digest(torch.zeros(8))
    assert digest(a) != digest(a.to(torch.float16))
    assert digest(a) != digest(a.view(2, 4))
