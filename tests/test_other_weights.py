"""A recipe knows the weights that it was found on: others of the same architecture are refused, or taken by name."""

import copy

import pytest
import torch
from typer.testing import CliRunner

from quantdm import QuantDMError, apply_recipe, load_pipeline
from quantdm.cli.main import app
from quantdm.hub.export import export_pipeline
from quantdm.modules import packed_layers
from quantdm.pipelines.seen import see
from quantdm.pipelines.sketch import sketch_of
from quantdm.recipe import Provenance, Recipe


def recipe_on(pipe) -> Recipe:
    """A recipe as a search on a pipeline leaves it."""
    return Recipe(model="mine", default="uniform-channel-4", provenance=Provenance(weights=see(pipe, {}).weights))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A recipe that was found on digits-dit, and the folder of a finetune: one layer moved as by a LoRA."""
    folder = tmp_path_factory.mktemp("finetune")
    pipe = load_pipeline("digits-dit")
    recipe = recipe_on(pipe)
    weight = pipe.transformer.transformer_blocks[2].attn1.to_q.weight
    with torch.no_grad():
        weight += 0.02 * torch.outer(torch.randn(len(weight)), torch.randn(weight.shape[1]))
    pipe.save_pretrained(folder / "finetune")
    return recipe, folder / "finetune"


def test_the_sketch_is_of_the_weights_and_not_of_their_dtype():
    pipe = load_pipeline("digits-dit")
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(1.0007)  # the embedded weights are of 16 bits
    full, half, brain = (
        sketch_of(copy.deepcopy(pipe.transformer).to(dtype)) for dtype in (torch.float32, torch.float16, torch.bfloat16)
    )
    assert len({full[0], half[0], brain[0]}) == 3
    assert full[1] == brain[0] == brain[1]
    assert full[2] == half[0] == half[2]
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            if parameter.ndim == 1:
                parameter.add_(1)  # what tuning may change
    assert sketch_of(pipe.transformer) == full


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_weights_take_the_recipe_in_every_dtype(dtype, found):
    pipe = load_pipeline("digits-dit", torch_dtype=dtype)
    assert packed_layers(apply_recipe(pipe, found[0], insist=True).transformer)


def test_a_recipe_that_was_found_in_16_bits_fits_the_files_of_32():
    pipe = load_pipeline("digits-dit", torch_dtype=torch.bfloat16)
    assert packed_layers(apply_recipe(load_pipeline("digits-dit"), recipe_on(pipe), insist=True).transformer)


def test_other_weights_are_refused_or_taken_by_name(found):
    recipe, finetune = found
    pipe = load_pipeline(finetune)
    with pytest.raises(QuantDMError, match=r"other weights of transformer .*fused LoRA.* --same-architecture"):
        apply_recipe(pipe, recipe, insist=True)
    assert not packed_layers(pipe.transformer)
    with pytest.raises(QuantDMError, match="other weights of transformer"):
        apply_recipe(pipe.transformer, recipe, insist=True)  # alone, too
    assert packed_layers(apply_recipe(pipe, recipe, same_architecture=True, insist=True).transformer)


def test_a_recipe_that_knows_no_weights_applies_as_before(found):
    recipe = found[0].model_copy(update={"provenance": Provenance()})
    assert "weights" not in recipe.to_yaml()
    assert packed_layers(apply_recipe(load_pipeline(found[1]), recipe, insist=True).transformer)


def test_the_command_line_refuses_other_weights_before_it_writes(found, tmp_path):
    recipe, finetune = found
    recipe.save(tmp_path / "r.yaml")
    arguments = ["apply", str(finetune), "--recipe", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "small")]
    for options in ([], ["--set", "proj_out*=original"]):  # rules that were changed are of the same weights still
        result = CliRunner().invoke(app, [*arguments, *options])
        assert isinstance(result.exception, QuantDMError)
        assert "--same-architecture" in str(result.exception)
        assert not (tmp_path / "small").exists()
    assert CliRunner().invoke(app, [*arguments, "--same-architecture"], catch_exceptions=False).exit_code == 0
    assert export_pipeline("digits-dit", recipe, tmp_path / "own").is_dir()
