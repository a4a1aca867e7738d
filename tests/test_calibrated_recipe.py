"""A calibrated recipe applies in one line: the weights are those of the bank, and what cannot be calibrated says so."""

import pytest
import torch

from quantdm import (
    CalibrationSpec,
    QuantDMError,
    Recipe,
    apply_recipe,
    export_pipeline,
    get_denoiser,
    list_layers,
    load_pipeline,
    load_protocol,
    load_recipe,
)
from quantdm.activations.calibration import calibrate
from quantdm.activations.moments import LazyMoments, gather_moments
from quantdm.denoisers.calls import record_calls
from quantdm.modules.packed import packed_layers
from quantdm.pipelines.generate import calibration_calls, generate
from quantdm.quantizers import quantize_weight
from quantdm.schemes import Scheme

SPEC = CalibrationSpec(protocol="digits-dit", images=4, first_seed=7, sweeps=1)
LABEL = "uniform-channel-3-feedback"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe(model="digits-dit", default=LABEL, patterns={"*norm*": "uniform-channel-8"}, calibration=SPEC)


@pytest.fixture(scope="module")
def applied(recipe):
    return apply_recipe(load_pipeline("digits-dit"), recipe, insist=True)


def test_the_weights_are_those_that_calibration_by_hand_gives(applied, dit):
    denoiser, protocol = get_denoiser(dit), load_protocol("digits-dit")
    with record_calls(denoiser) as recording:
        generate(dit, protocol, range(7, 11))
    layers = {layer.name: layer for layer in list_layers(denoiser)}
    names = [name for name in layers if "norm" not in name][:3]
    moments = gather_moments(denoiser, recording.calls, names)
    for name in names:
        wanted = quantize_weight(
            denoiser.get_parameter(f"{name}.weight"),
            Scheme.parse(LABEL),
            split=layers[name].split,
            moments=moments[name],
            sweeps=1,
        )
        assert torch.equal(get_denoiser(applied).get_submodule(name).weight, wanted.dequantize())


def test_calibration_pays(applied, dit):
    plain = apply_recipe(
        load_pipeline("digits-dit"), Recipe(model="digits-dit", default="uniform-channel-3"), insist=True
    )
    protocol = load_protocol("digits-dit")
    truth, far, near = (generate(pipe, protocol, range(8), steps=4) for pipe in (dit, plain, applied))
    assert (near - truth).square().mean() < 0.7 * (far - truth).square().mean()


def test_an_export_from_files_holds_the_same_weights(applied, recipe, tmp_path):
    folder = export_pipeline("digits-dit", recipe, tmp_path / "export")
    opened = packed_layers(get_denoiser(load_pipeline(folder)))
    for name, layer in packed_layers(get_denoiser(applied)).items():
        assert torch.equal(opened[name].weight, layer.weight)
    assert load_recipe(folder / "recipe.yaml").calibration == SPEC


def test_what_a_recipe_says_is_overruled_by_the_caller(recipe):
    other = apply_recipe(
        load_pipeline("digits-dit"),
        recipe,
        calibration=SPEC.model_copy(update={"first_seed": 100, "images": 2}),
        insist=True,
    )
    again = apply_recipe(load_pipeline("digits-dit"), recipe, insist=True)
    name = next(n for n in packed_layers(get_denoiser(again)) if "norm" not in n)
    assert not torch.equal(
        get_denoiser(other).get_submodule(name).weight, get_denoiser(again).get_submodule(name).weight
    )


def test_moments_group_by_group_are_those_of_all_at_once(dit):
    denoiser = get_denoiser(dit)
    calls = calibration_calls(dit, load_protocol("digits-dit"), range(2), steps=2)
    names = [layer.name for layer in list_layers(denoiser)][:6]
    lazy = LazyMoments(denoiser, calls, names, budget_bytes=1)  # every layer alone
    whole = gather_moments(denoiser, calls, names)
    assert list(lazy) == names
    for name in names:
        assert torch.equal(lazy[name].second, whole[name].second)
        assert len(lazy._now) == 1
    with pytest.raises(KeyError):
        lazy["nothing"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": None}, r"does not say on what; pass\s+calibration=CalibrationSpec"),
        ({"calibration": SPEC.model_copy(update={"protocol": "nowhere.yaml"})}, r"got 'nowhere.yaml'"),
        ({"components": {"vae": {"default": "uniform-channel-4-importance"}}}, r"only denoisers can be calibrated"),
    ],
)
def test_what_cannot_be_calibrated_is_one_clear_error_and_nothing_changes(recipe, changes, message):
    pipe = load_pipeline("digits-dit")
    record = recipe.model_dump(exclude_none=True) | changes
    with pytest.raises(QuantDMError, match=message):
        apply_recipe(pipe, Recipe.model_validate(record), insist=True)
    assert not packed_layers(get_denoiser(pipe))


def test_a_lone_denoiser_is_not_calibrated(recipe):
    denoiser = get_denoiser(load_pipeline("digits-dit"))
    with pytest.raises(QuantDMError, match=r"apply the recipe to the pipeline, or pass a bank"):
        apply_recipe(denoiser, recipe, insist=True)
    assert not packed_layers(denoiser)


def test_silent_denoisers_are_named(dit):
    spec = SPEC.model_copy(update={"images": 1})
    moments = calibrate(dit, spec, {"transformer": ["proj_out_1"]})
    assert moments["transformer"]["proj_out_1"].count > 0


def test_the_recipe_of_a_calibrated_run_says_what_it_was_calibrated_on(finished):
    from quantdm.runs.labels import calibration_of
    from quantdm.runs.run import Run

    settings = Run.open(finished[0]).settings
    assert finished[1].calibration is None  # its options need none
    spec = calibration_of(settings, {"a": "kmeans-channel-3-feedback"})
    assert spec is not None
    assert (spec.protocol, spec.images, spec.sweeps) == ("digits-dit", settings.calibration_images, settings.sweeps)
