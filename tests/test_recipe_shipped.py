"""The recipes of public denoisers: every layer covered, the size of the title, and no claim of a measurement."""

from pathlib import Path

import diffusers
import pytest
import torch

from quantdm import load_pipeline
from quantdm.denoisers.inventory import list_layers
from quantdm.hub.quantize import average_bits
from quantdm.hub.worth import check_worth
from quantdm.quantizers.worth import is_wasteful
from quantdm.recipe import PUBLISHED_INSIGHT, load_recipe
from tests.architectures import PUBLIC

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
TITLES = {
    "pixart-alpha-3.4bit": ("pixart-xl-2", 3.4),
    "pixart-sigma-3.9bit": ("pixart-xl-2", 3.9),
    "hunyuan-dit-3.65bit": ("hunyuan-dit", 3.65),
    "sdxl-3.7bit": ("sdxl", 3.7),
    "dit-xl-2-3.5bit": ("dit-xl-2", 3.5),
    "sd-1.5-4.0bit": ("sd-1.5", 4.0),
    "sd-3.5-medium-4.0bit": ("sd-3.5-medium", 4.0),
    "flux.1-4.0bit": ("flux.1-dev", 4.0),
}


def layers_of(architecture, **changes):
    """The layers of a public configuration, without weights."""
    name, config = PUBLIC[architecture]
    with torch.device("meta"):
        return list_layers(getattr(diffusers, name)(**{**config, **changes}))


@pytest.mark.parametrize("name", TITLES)
def test_a_published_insight_covers_its_architecture_at_its_title(name):
    architecture, title = TITLES[name]
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    layers = layers_of(architecture)
    config = recipe.resolve(layers)  # raises when a rule matches nothing or a layer has no scheme
    assert list(config) == [layer.name for layer in layers]
    assert None not in config.values()
    assert not [layer.name for layer in layers if is_wasteful(layer.shape, config[layer.name], layer.split)]
    bits = average_bits(layers, config)
    assert abs(bits - title) <= 0.02
    assert recipe.avg_bits == pytest.approx(bits, abs=1e-4)
    assert recipe.provenance.source == PUBLISHED_INSIGHT == "published insight, not measured here"
    assert not recipe.provenance.measured
    methods = [scheme.method for scheme in config.values() if scheme is not None]
    unet = "UNet" in PUBLIC[architecture][0]
    assert max(set(methods), key=methods.count) == ("uniform" if unet else "kmeans")
    ends = [layer.name for layer in layers if layer.name in ("conv_in", "conv_out", "proj_out", "proj_out_2")]
    by_name = {name: scheme.bits for name, scheme in config.items() if scheme is not None}
    assert min(by_name[name] for name in ends) >= 6
    queries = [bits for name, bits in by_name.items() if name.endswith(".attn1.to_q")]
    assert not queries or max(queries) == 3


def test_every_recipe_of_a_public_model_is_checked():
    others = {path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("digits-")}
    assert others == set(TITLES)


def test_relatives_of_an_architecture_take_the_same_recipe():
    conditions = layers_of("pixart-xl-2", sample_size=128, use_additional_conditions=True)
    assert len(conditions) > 287
    load_recipe(FOLDER / "pixart-alpha-3.4bit.yaml").resolve(conditions)


@pytest.mark.parametrize("model", ["digits-dit", "digits-sd"])
def test_no_recipe_of_an_embedded_pipeline_costs_more_than_it_saves(model):
    pipe, paths = load_pipeline(model), sorted(FOLDER.glob(f"{model}-*.yaml"))
    assert len(paths) > 5
    for path in paths:
        check_worth(pipe, load_recipe(path))
