"""What layers multiply: counted in the trace, priced by bits, shown by inspect."""

import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import quantdm
from quantdm.cli.main import app
from quantdm.denoisers.constants import map_tensors
from quantdm.denoisers.example_inputs import infer_inputs
from quantdm.denoisers.inventory import list_layers
from quantdm.denoisers.macs import layer_macs
from quantdm.recipe import ActivationScheme, ActivationSpec, Recipe, bit_operations
from quantdm.schemes import Scheme
from tests.test_activations import MODELS


def counted(model: nn.Module, inputs: dict) -> int:
    """Return what torch counts for the layers alone: two operations a MAC, attention left out."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    found = counter.get_flop_counts()["Global"]
    return sum(count for op, count in found.items() if "attention" not in str(op) and "bmm" not in str(op)) // 2


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_macs_of_layers_are_those_that_torch_counts_for_one_sample(make) -> None:
    model = make()
    inferred = infer_inputs(model, dict(model.config))
    inputs = map_tensors(inferred, lambda tensor: torch.zeros(tensor.shape) if tensor.is_meta else tensor)
    macs = layer_macs(model)
    assert set(macs) == {record.name for record in list_layers(model)}
    assert sum(macs.values()) == counted(model, inputs) // 2  # a batch of two
    latents = next(name for name in ("sample", "hidden_states") if name in inputs)
    assert macs["conv_in" if "conv_in" in macs else "proj_out"] > 0
    single = map_tensors(inputs, lambda tensor: tensor[:1] if tensor.dim() else tensor)
    assert single[latents].shape[0] == 1
    assert layer_macs(model, example_inputs=single) == macs


def test_bit_operations_are_the_product_of_both_bits_and_sixteen_where_nothing_is_quantized() -> None:
    macs = {"a": 10, "b": 100, "c": 1000}
    weights = {"a": Scheme.parse("kmeans-channel-4"), "b": Scheme.parse("uniform-channel-2"), "c": None}
    inputs = {"a": ActivationScheme(bits=6), "b": None}
    assert bit_operations(macs, weights, inputs) == 10 * 4 * 6 + 100 * 2 * 16 + 1000 * 256
    assert bit_operations(macs, {}, {}) == 1110 * 256


def test_inspect_tells_operations_of_a_recipe_and_of_its_export_alike(tmp_path) -> None:
    spec = ActivationSpec(default="token-6", types={"proj_out_2": "token-8"})
    recipe = Recipe(model="digits-dit", default="uniform-channel-4", activations=spec)
    path = recipe.save(tmp_path / "recipe.yaml")
    denoiser = quantdm.load_pipeline("digits-dit").transformer
    macs = layer_macs(denoiser)
    expected = sum(n * 4 * (8 if name == "proj_out_2" else 6) for name, n in macs.items())
    quantdm.export_pipeline("digits-dit", recipe, tmp_path / "small")
    for target in (path, tmp_path / "small"):
        record = json.loads(CliRunner().invoke(app, ["inspect", str(target), "--json"]).output)
        assert record["bops"] == expected
        assert record["macs"] == sum(macs.values())
        assert {row["name"]: row["activation"] for row in record["layers"]}["proj_out_2"] == "token-8"
    plain = CliRunner().invoke(app, ["inspect", "digits-dit"]).output
    assert f"{sum(macs.values()) * 256 / 1e9:,.2f} GBOP" in " ".join(plain.split())
