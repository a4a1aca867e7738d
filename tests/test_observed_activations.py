"""What is observed along trajectories: static ranges and the scheme that each layer takes best, on a real pipeline."""

import pytest
import torch

import quantdm
from quantdm.activations import activation_spec, set_activation_bits_
from quantdm.activations.choose import choose_activations
from quantdm.activations.observe import observe_ranges
from quantdm.denoisers.inventory import list_layers
from quantdm.errors import QuantDMError
from quantdm.recipe import ActivationSpec, CalibrationSpec
from tests.planted_outliers import plant_outliers_

CALIBRATION = CalibrationSpec(protocol="digits-dit", images=4, steps=3)


@pytest.fixture(scope="module")
def pipe():
    """Open the embedded pipeline once."""
    return quantdm.load_pipeline("digits-dit")


def images(pipe, seed: int = 0) -> torch.Tensor:
    """Make a few latents."""
    generator = torch.Generator().manual_seed(seed)
    return torch.from_numpy(pipe([3, 5], num_inference_steps=3, generator=generator, output_type="np").images)


def test_static_ranges_are_the_hull_of_what_was_seen_and_travel_as_plain_data(pipe) -> None:
    spec = ActivationSpec(default="tensor-8-static", attention="token-8")
    exact = images(pipe)
    with pytest.raises(QuantDMError, match="observe"):
        set_activation_bits_(pipe.transformer, spec)
    one = observe_ranges(pipe, spec, CALIBRATION)
    three = observe_ranges(pipe, spec, CALIBRATION, buckets=3)
    assert activation_spec(pipe.transformer) is None  # left as it was
    assert len(three.buckets) == 2
    assert three.buckets[0] > three.buckets[1]
    for name, hull in one.ranges.items():
        assert len(three.ranges[name]) == 3
        assert min(low for low, _ in three.ranges[name]) == hull[0][0]
        assert max(high for _, high in three.ranges[name]) == hull[0][1]
    assert ActivationSpec.model_validate_json(three.model_dump_json()) == three
    errors = {}
    for name, observed in {"one": one, "three": three}.items():
        set_activation_bits_(pipe.transformer, observed)
        errors[name] = float((images(pipe) - exact).square().mean())
        set_activation_bits_(pipe.transformer, None)
    assert 0 < errors["three"] < errors["one"] < 1e-2
    clipped = observe_ranges(pipe, ActivationSpec(default="tensor-8-static-percentile"), CALIBRATION)
    assert all(
        low >= one.ranges[name][0][0] and high <= one.ranges[name][0][1]
        for name, ((low, high),) in clipped.ranges.items()
    )
    with pytest.raises(QuantDMError, match="expected 1 to 3"):
        observe_ranges(pipe, spec, CALIBRATION, buckets=4)
    with pytest.raises(QuantDMError, match="no scheme of the spec is static"):
        observe_ranges(pipe, ActivationSpec(default="token-8"), CALIBRATION)


def test_where_outliers_were_planted_a_remedy_is_chosen_and_brings_the_images_back() -> None:
    pipe = quantdm.load_pipeline("digits-dit")
    plain = images(pipe)
    planted = plant_outliers_(pipe.transformer)
    assert len(planted) > 10
    exact = images(pipe)
    assert float((exact - plain).abs().max()) < 1e-3  # the same function
    naive = ActivationSpec(default="token-6")
    chosen, errors = choose_activations(pipe, naive, CALIBRATION)
    layers = {name for name in planted if "-" in chosen.layers[name].removeprefix("token-6")}  # type: ignore[union-attr]
    assert len(layers) > 0.8 * len(planted)
    assert set(errors) == {record.name for record in list_layers(pipe.transformer)}
    error = {}
    for name, spec in {"naive": naive, "chosen": chosen}.items():
        set_activation_bits_(pipe.transformer, spec)
        error[name] = float((images(pipe) - exact).square().mean())
        set_activation_bits_(pipe.transformer, None)
    assert error["chosen"] < 0.3 * error["naive"]


def test_an_input_that_is_not_finite_is_named_with_its_timestep() -> None:
    pipe = quantdm.load_pipeline("digits-dit")
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].attn1.to_q.bias[0] = torch.nan
    with pytest.raises(QuantDMError, match=r"transformer_blocks\.0\.attn1\.to_out\.0: .*not finite at timestep \d+"):
        choose_activations(pipe, ActivationSpec(default="token-6"), CALIBRATION)
    assert not any(module._forward_pre_hooks for module in pipe.transformer.modules())


def test_ranges_of_layers_that_are_called_by_keyword_are_observed(pipe, monkeypatch) -> None:
    layer = pipe.transformer.proj_out_1
    spec = ActivationSpec(layers={"proj_out_1": "tensor-8-static"})
    plain = observe_ranges(pipe, spec, CALIBRATION).ranges
    call = type(layer).__call__
    monkeypatch.setattr(
        type(layer), "__call__", lambda self, x: call(self, input=x) if self is layer else call(self, x)
    )
    assert observe_ranges(pipe, spec, CALIBRATION).ranges == plain


def test_what_was_observed_of_another_model_is_observed_anew(pipe) -> None:
    foreign = {"ranges": {"unet.conv_in": ((0.0, 1.0),)}, "equalisers": {"unet.conv_in": "mm"}}
    for spec in (ActivationSpec(layers={"proj_out_1": "tensor-8-static"}), ActivationSpec(default="token-6")):
        with pytest.raises(QuantDMError, match="another model's"):
            spec.model_copy(update=foreign).resolve(list_layers(pipe.transformer))
    static = ActivationSpec(layers={"proj_out_1": "tensor-8-static"})
    again = observe_ranges(pipe, static.model_copy(update=foreign), CALIBRATION)
    assert again == observe_ranges(pipe, static, CALIBRATION)
    rounded = ActivationSpec(layers={"proj_out_1": "token-4"})
    chosen = choose_activations(pipe, rounded.model_copy(update=foreign), CALIBRATION)
    assert chosen == choose_activations(pipe, rounded, CALIBRATION)
