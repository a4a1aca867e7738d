"""Equalisation between channels: exact in full precision, stored with the weight, and a remedy against outliers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantdm
from quantdm.activations import set_activation_bits_
from quantdm.activations.handover import input_for, quantize_input
from quantdm.denoisers.inventory import list_layers
from quantdm.errors import QuantDMError
from quantdm.hub.model_card import write_card
from quantdm.modules import execution, quantize_module_
from quantdm.modules.coded import CodedInput
from quantdm.quantizers import Moments, quantize_weight
from quantdm.quantizers.equaliser import MOST, equalise_moments, exponents_of, from_letters, shifted, to_letters
from quantdm.quantizers.weight import count_bits
from quantdm.recipe import ActivationScheme, ActivationSpec, CalibrationSpec, Recipe, match_weights
from quantdm.schemes import QuantConfig, Scheme
from quantdm.tuning.weights import TunableWeight
from tests.test_activations import make_transformer, run
from tests.test_execution import error, marked, record_of, simulated


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments_of(x: Tensor) -> Moments:
    """Return the second moments of rows."""
    return Moments((x.T @ x / len(x))[None], len(x))


def loud(channels: int, at: int = 3, by: float = 50.0) -> Tensor:
    """Return rows of inputs of which one channel is large."""
    x = noise(200, channels, seed=2)
    x[:, at] *= by
    return x


def test_an_equalised_layer_in_full_precision_is_the_plain_one_bit_by_bit() -> None:
    exponents = torch.tensor([-MOST, -1, 0, 1, 5, MOST], dtype=torch.int8)
    assert torch.equal(from_letters(to_letters(exponents)), exponents)
    assert to_letters(torch.tensor([0, 1, -1], dtype=torch.int8)) == "mnl"
    x, w = noise(7, 6), noise(5, 6, seed=1)
    assert torch.equal(shifted(shifted(x, exponents, -1, -1), exponents, -1, 1), x)
    assert torch.equal(shifted(x, exponents, -1, 1), x * torch.tensor([2.0**k for k in exponents.tolist()]))
    assert torch.equal(F.linear(shifted(x, exponents, -1, -1), shifted(w, exponents, 1, 1)), F.linear(x, w))
    images, kernel = noise(2, 12, 4, 4), noise(4, 6, 3, 3, seed=1)  # two groups share the exponents
    divided = shifted(images, exponents, 1, -1)
    assert torch.equal(
        F.conv2d(divided, shifted(kernel, exponents, 1, 1), groups=2), F.conv2d(images, kernel, groups=2)
    )


def test_the_exponents_share_the_spread_between_input_and_weight() -> None:
    reach = torch.tensor([1.0, 64.0, 1.0, 0.0])
    weight = torch.ones(2, 4)
    assert exponents_of(reach, weight, 1.0).tolist() == [0, 6, 0, 0]
    assert exponents_of(reach, weight, 0.5).tolist() == [0, 3, 0, 0]
    assert exponents_of(torch.ones(4), torch.tensor([[1.0, 1 / 16, 1.0, 0.0]]), 0.5).tolist() == [0, 2, 0, 0]
    x = noise(50, 8 * 4).double()  # 8 channels of 4 positions
    exponents = torch.arange(8, dtype=torch.int8) - 3
    divided = shifted(x.view(50, 8, 4), exponents, 1, -1).reshape(50, -1)
    assert torch.equal(equalise_moments(moments_of(x), exponents).second[0], moments_of(divided).second[0])


LABELS = ("uniform-channel-4-equalised50-feedback", "kmeans-channel-3-equalised75-importance")
LABELS += ("kmeans-shared64-3-equalised25-feedback", "kmeans-tensor-2-equalised100-feedback")


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize(("shape", "split"), [((6, 128), None), ((6, 128), 48), ((8, 16, 3, 3), 4)])
def test_an_equalised_scheme_is_the_plain_one_of_the_equalised_weight_and_costs_a_byte_per_channel(
    label: str, shape: tuple[int, ...], split: int | None
) -> None:
    scheme, weight = Scheme.parse(label), noise(*shape)
    assert scheme.label == label
    moments = moments_of(loud(weight[0].numel()))
    found = quantize_weight(weight, scheme, split=split, moments=moments)
    exponents = found.tensors["exponents"]
    assert len(exponents) == shape[1]
    assert int(exponents.max()) > 0
    assert found.num_bits == count_bits(shape, scheme.in_place, split) + 8 * shape[1]
    own = quantize_weight(
        shifted(weight, exponents, 1, 1), scheme.in_place, split=split, moments=equalise_moments(moments, exponents)
    )
    dense = found.dequantize()
    assert torch.equal(shifted(own.dequantize(), exponents, 1, -1), dense)
    assert torch.equal(TunableWeight(found)().detach(), dense)
    assert torch.equal(found.dequantize(dtype=torch.bfloat16), dense.bfloat16())


def test_what_does_not_go_together_is_refused() -> None:
    for label in ("uniform-channel-4-equalised50", "uniform-channel-4-hadamard-equalised50-feedback"):
        with pytest.raises(QuantDMError, match="equalised does not fit"):
            Scheme.parse(label)
    with pytest.raises(QuantDMError, match="rotated or equalised"):
        ActivationScheme.parse("token-4-hadamard-equalised")
    with pytest.raises(ValueError, match="no weight to equalise"):
        ActivationSpec(attention="token-4-equalised")
    with pytest.raises(ValueError, match="a letter from a to y"):
        ActivationSpec(equalisers={"proj_out": "mmZ"})
    model = make_transformer()
    spec = ActivationSpec(layers={"proj_out": "token-4-equalised"})
    with pytest.raises(QuantDMError, match="proj_out is token-4-equalised, and neither its weight nor the spec has"):
        set_activation_bits_(model, spec)
    with pytest.raises(QuantDMError, match="the equaliser of proj_out has 3 letters, expected 16"):
        set_activation_bits_(model, spec.model_copy(update={"equalisers": {"proj_out": "mmm"}}))
    assert not model.proj_out._forward_pre_hooks


def test_it_repairs_what_an_outlier_channel_breaks_and_a_neutral_equaliser_changes_nothing() -> None:
    model, plain, equalised = make_transformer(), ActivationScheme(bits=4), ActivationScheme(bits=4, equalised=True)
    record = next(layer for layer in list_layers(model) if layer.name == "proj_out")
    x, weight = loud(16), noise(8, 16, seed=1)
    weight[:, 3] /= 50  # what the channel carries is ordinary
    exact = x @ weight.T

    def missed(scheme: ActivationScheme, exponents: Tensor | None = None) -> float:
        return float((quantize_input(x, record, scheme, exponents=exponents) @ weight.T - exact).square().mean())

    exponents = exponents_of(x.abs().amax(0), weight, 0.5)
    assert missed(equalised, exponents) < 0.02 * missed(plain)
    assert missed(equalised, torch.zeros(16, dtype=torch.int8)) == missed(plain)
    outputs = []
    for label in ("token-4", "token-4-equalised"):
        spec = ActivationSpec(layers={"proj_out": label}, equalisers={"proj_out": "m" * 16})
        set_activation_bits_(model, ActivationSpec.model_validate_json(spec.model_dump_json()))
        outputs.append(run(model))
    assert torch.equal(*outputs)


LAYERS = {
    "linear": (lambda: nn.Linear(37, 29), (3, 11, 37), None, 1),
    "linear of a long skip": (lambda: nn.Linear(40, 16), (2, 9, 40), 24, 1),
    "conv": (lambda: nn.Conv2d(8, 5, 3, padding=1), (2, 8, 9, 8), None, 1),
    "conv grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2), (2, 8, 9, 8), None, 2),
    "conv 1x1 of a long skip": (lambda: nn.Conv2d(10, 8, 1), (3, 10, 9, 8), 4, 1),
}


@torch.no_grad()
@pytest.mark.parametrize("weight", ["uniform-channel-4-equalised50-feedback", "kmeans-channel-3-equalised75-feedback"])
@pytest.mark.parametrize("kind", marked(LAYERS))
def test_integers_give_what_the_simulation_gives(kind: str, weight: str) -> None:
    execution.say_once.cache_clear()
    torch.manual_seed(0)
    make, shape, split, groups = LAYERS[kind]
    layer, n = make(), make().weight[0].numel()
    second = moments_of(loud(n, at=1)).second.repeat(groups, 1, 1)
    quantized = quantize_weight(layer.weight, Scheme.parse(weight), split=split, moments=Moments(second, 200))
    packed = quantize_module_(nn.Sequential(layer), "0", quantized)
    packed.keep_("integer")
    assert packed.residency == "integer"
    x, record = torch.randn(shape) + 1, record_of(packed, split)
    for label in ("token-8-equalised", "sample-4-mse-equalised", "tensor-6-symmetric-equalised"):
        scheme = ActivationScheme.parse(label)
        coded = input_for(packed, x, record, scheme, None)
        assert isinstance(coded, CodedInput)
        assert torch.equal(coded.values(), quantize_input(x, record, scheme, exponents=packed.exponents))
        expected = simulated(packed, x, record, scheme, exponents=packed.exponents)
        assert error(packed.forward(coded), expected) < 1e-5, label


@torch.no_grad()
def test_an_equalised_weight_with_plain_inputs_stays_simulated_and_says_so(caplog) -> None:
    execution.say_once.cache_clear()
    layer = nn.Linear(16, 8)
    label = Scheme.parse("uniform-channel-4-equalised50-feedback")
    packed = quantize_module_(
        nn.Sequential(layer), "0", quantize_weight(layer.weight, label, moments=moments_of(loud(16)))
    )
    packed.keep_("integer")
    x, record = noise(5, 16), record_of(packed)
    for _ in range(2):
        assert isinstance(input_for(packed, x, record, ActivationScheme(bits=8), None), Tensor)
    assert [r.message for r in caplog.records if "equalised weights need equalised inputs" in r.message] != []
    assert len(caplog.records) == 1


def test_weights_are_matched_to_the_coordinates_of_their_inputs() -> None:
    labels = {"a": "uniform-channel-4-feedback", "b": "kmeans-channel-3", "c": None, "d": "kmeans-tensor-2-hadamard"}
    inputs = {"a": "token-4-equalised", "b": "token-6-hadamard", "c": "token-4-hadamard", "d": "token-8"}
    schemes = {name: ActivationScheme.parse(label) for name, label in inputs.items()}
    found = match_weights(QuantConfig.from_labels(labels), schemes).to_labels()
    expected = {"a": "uniform-channel-4-equalised50-feedback", "b": "kmeans-channel-3-hadamard", "c": None}
    assert found == expected | {"d": "kmeans-tensor-2"}
    plain = match_weights(QuantConfig.from_labels({"b": "kmeans-channel-3"}), {"b": schemes["a"]})
    assert plain.to_labels() == {"b": "kmeans-channel-3"}  # without moments it cannot be equalised


OPEN = """
import sys, torch, quantdm
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
generator = torch.Generator().manual_seed(5)
images = pipe([3], num_inference_steps=2, generator=generator, output_type="np").images
torch.save(torch.from_numpy(images), sys.argv[2])
"""


def test_an_equalised_export_opens_elsewhere_with_its_activations_on_and_its_card_says_so(tmp_path) -> None:
    block = "transformer_blocks.0.attn1"
    spec = ActivationSpec(
        default="token-6",
        layers={f"{block}.to_q": "token-6-equalised", f"{block}.to_k": "token-6-equalised"},
        equalisers={f"{block}.to_k": "mnl" + "m" * 157},
    )
    layers = {f"{block}.to_q": "uniform-channel-4-equalised50-feedback", f"{block}.to_k": "original"}
    calibration = CalibrationSpec(protocol="digits-dit", images=2, steps=2)
    default = {"default": "uniform-channel-3", "calibration": calibration, "activations": spec}
    recipe = Recipe.model_validate({"model": "digits-dit", "layers": layers, **default})
    pipe = quantdm.load_pipeline("digits-dit")
    quantdm.apply_recipe(pipe, recipe, insist=True)
    assert pipe.transformer.get_submodule(f"{block}.to_q").exponents is not None

    def images() -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return torch.from_numpy(pipe([3], num_inference_steps=2, generator=generator, output_type="np").images)

    expected = images()
    set_activation_bits_(pipe.transformer, None)
    assert not torch.equal(images(), expected)
    folder = quantdm.export_pipeline("digits-dit", recipe, tmp_path / "small")
    command = [sys.executable, "-c", OPEN, str(folder), str(tmp_path / "found.pt")]
    subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[1])
    assert torch.equal(torch.load(tmp_path / "found.pt"), expected)
    assert "its inputs are rounded, as it is opened: token-6 activations" in write_card(folder).read_text()
