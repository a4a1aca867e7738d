"""Exports that an earlier quantdm wrote are opened exactly, or refused by their version.

`data/export-v2` was written by quantdm 0.1.0: a tiny DiT under eight schemes, its decoded weights and one output.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel

from quantdm import QuantDMError
from quantdm.files import load_tensors
from quantdm.modules import packed_layers
from tests.forge import edit_json

OLD = Path(__file__).parent / "data" / "export-v2"


def test_an_export_of_version_2_decodes_to_the_same_weights():
    expected, _ = load_tensors(OLD / "expected.safetensors")
    model = DiTTransformer2DModel.from_pretrained(OLD / "transformer")
    layers = packed_layers(model)
    assert len(layers) == sum(name.startswith("weight.") for name in expected)
    for name, layer in layers.items():
        assert torch.equal(layer.dequantize(dtype=torch.float32), expected[f"weight.{name}"]), name
    with torch.no_grad():
        output = model(expected["sample"], timestep=torch.tensor([10, 500]), class_labels=torch.tensor([1, 2])).sample
    torch.testing.assert_close(output, expected["output"], rtol=1e-4, atol=1e-5)  # products round as the processor does


@pytest.mark.parametrize("version", [1, 3, "two", None])
def test_an_export_of_another_version_is_refused_by_name(tmp_path, version):
    shutil.copytree(OLD / "transformer", tmp_path / "transformer")
    edit_json(tmp_path / "transformer/config.json", lambda c: c["quantization_config"].update(version=version))
    with pytest.raises(QuantDMError, match=f"got version {json.loads(json.dumps(version))!r}, expected 2"):
        DiTTransformer2DModel.from_pretrained(tmp_path / "transformer")
