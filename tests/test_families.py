"""Many denoiser classes and text encoders: quantized, saved, opened in a new process, they answer bit by bit alike."""

import re
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import quantdm
from quantdm.denoisers.inventory import list_layers
from quantdm.hub import apply_recipe
from quantdm.modules import packed_layers
from quantdm.recipe import Recipe
from tests.family_models import DENOISERS, DTYPES, FAMILIES, answer, make, open_
from tests.hub_models import MIXED

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = {"whole": "10GB", "shards": "12KB"}


class Answers(NamedTuple):
    """What the models said: before quantization, quantized in this process, opened in another one."""

    dense: dict[str, Tensor]
    here: dict[str, Tensor]
    there: dict[str, Tensor]
    root: Path


def names_of(model: nn.Module) -> list[str]:
    """Return the quantizable layers of a model of either library."""
    if isinstance(model, PreTrainedModel):
        return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [record.name for record in list_layers(model)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    root = tmp_path_factory.mktemp("families")
    dense, here = {}, {}
    for family in FAMILIES:
        make(family).save_pretrained(root / f"dense-{family}")
        for kind, dtype in DTYPES.items():
            # As a user does it: opened in a dtype, not cast (some classes keep some modules in float32).
            model = open_(root / f"dense-{family}", dtype)
            key = f"{family}/{kind}"
            dense[key] = answer(model)
            layers = dict(zip(names_of(model), cycle(MIXED), strict=False))
            apply_recipe(model, Recipe(model=family, layers=layers), insist=True)
            here[key] = answer(model)
            for layout, size in LAYOUTS.items():
                model.save_pretrained(root / key / layout, max_shard_size=size)
    subprocess.run([sys.executable, "-m", "tests.family_models", str(root)], check=True, timeout=500, cwd=ROOT)
    return Answers(dense, here, load_file(root / "answers.safetensors"), root)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_opened_in_a_new_process_answers_bit_by_bit_alike(
    family: str, kind: str, layout: str, answers: Answers
) -> None:
    key = f"{family}/{kind}"
    y = answers.here[key]
    assert y.dtype == DTYPES[kind]
    assert torch.isfinite(y).all()
    assert not torch.equal(y, answers.dense[key])  # it really is quantized
    assert torch.equal(answers.there[f"{key}/{layout}"], y)
    files = list((answers.root / key / layout).glob("*.safetensors"))
    assert len(files) == 1 if layout == "whole" else len(files) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_mix_three_methods_at_2_to_8_bits(family: str, answers: Answers) -> None:
    schemes = {layer.scheme for layer in packed_layers(open_(answers.root / family / "fp32/whole")).values()}
    assert {scheme.method for scheme in schemes} == {"uniform", "kmeans", "log2"}
    assert {scheme.bits for scheme in schemes} == {2, 3, 4, 5, 6, 7, 8}


def test_every_kind_of_layer_and_a_long_skip_are_among_them(answers: Answers) -> None:
    layers = [
        layer for family in DENOISERS for layer in packed_layers(open_(answers.root / family / "fp32/whole")).values()
    ]
    assert {type(layer).__name__ for layer in layers} >= {"QuantLinear", "QuantConv1d", "QuantConv2d", "QuantConv3d"}
    assert any(layer.split is not None for layer in layers)


def test_no_code_of_the_package_names_a_model_class() -> None:
    classes = re.compile("|".join(sorted({cls for cls, _ in FAMILIES.values()})))
    files = list(Path(quantdm.__file__).parent.rglob("*.py"))
    assert len(files) > 40
    assert not [path for path in files if classes.search(path.read_text())]
