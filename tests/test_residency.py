"""Residencies: packed, int8 and dense layers answer bit by bit alike, weigh what they say, and are saved alike."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quantdm.errors import QuantDMError
from quantdm.modules import RESIDENCIES, dense_weights, packed_layers, quantize_module_, set_residency
from quantdm.modules.int8 import int8_form
from quantdm.quantizers import quantize_weight
from quantdm.schemes import Scheme

FORMS = RESIDENCIES[:3]  # packed, int8, dense: those that multiply in floating point, see test_execution for others
EXACT = (
    "uniform-channel-2", "uniform-channel-8", "uniform-group8-5", "uniform-group7-4", "uniform-tensor-8",
    "kmeans-channel-3", "kmeans-group16-7", "kmeans-tensor-4-int8", "log2-channel-2", "log2-channel-3",
)  # fmt: skip
INEXACT = ("kmeans-tensor-4", "kmeans-channel-3-fp16", "log2-channel-5")
LAYERS = {
    "linear": (lambda: nn.Linear(34, 12), (3, 34)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 3, padding=1), (2, 6, 9)),
    "conv2d grouped": (lambda: nn.Conv2d(6, 10, 3, groups=2), (2, 6, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2), (2, 6, 4, 4, 4)),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def quantized(layer: nn.Module, label: str, split: int | None = None, shift: float = 0.0) -> nn.Module:
    """Return a model with one packed layer, `0`."""
    model = nn.Sequential(layer)
    weight = layer.weight.detach() + shift
    quantize_module_(model, "0", quantize_weight(weight, Scheme.parse(label), split=split, name="0"))
    return model


def answers(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Call a model with autograd, without it, and in inference mode."""
    outputs = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            outputs.append(model(x).clone())
    return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("label", EXACT)
def test_all_residencies_answer_bit_by_bit_alike(label: str, kind: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[kind]
    model, x = quantized(make().to(dtype), label), torch.randn(shape, dtype=dtype)
    expected, state = answers(model, x), model.state_dict()
    for residency in reversed(FORMS):
        assert set_residency(model, residency) == ()  # type: ignore[arg-type]
        assert model[0].residency == residency
        assert all(torch.equal(y, e) for y, e in zip(answers(model, x), expected, strict=True))
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("label", EXACT)
def test_the_halves_of_a_long_skip_and_rows_far_from_zero_have_an_int8_form(label: str) -> None:
    layer = nn.Conv2d(10, 8, 3)
    layer.weight.data[:, 6:] *= 50
    for shift in (0.0, 3.0):  # a row without zero has a large zero point
        model = quantized(layer, label, split=6, shift=shift)
        x = torch.randn(2, 10, 8, 8)
        expected = answers(model, x)
        assert set_residency(model, "int8") == ()
        assert all(torch.equal(y, e) for y, e in zip(answers(model, x), expected, strict=True))


@pytest.mark.parametrize("label", EXACT)
def test_the_int8_form_weighs_a_byte_a_weight_and_at_most_8_a_row(label: str) -> None:
    weight = torch.randn(64, 96)
    scheme = Scheme.parse(label)
    form = int8_form(quantize_weight(weight, scheme))
    assert form is not None
    rows = {"tensor": 1, "channel": 64, "group": 64 * -(-96 // (scheme.group_size or 96))}[scheme.granularity]
    assert weight.numel() < form.nbytes <= weight.numel() + 8 * rows


def test_what_has_no_exact_int8_form_stays_packed_and_is_named() -> None:
    layers = [quantized(nn.Linear(40, 12), label)[0] for label in (*INEXACT, *EXACT)]
    model = nn.Sequential(*layers)
    with pytest.warns(UserWarning, match=r"3 of 13 layers stay packed \(kmeans-channel-3-fp16, .*first 0, 1, 2"):
        assert set_residency(model, "int8") == ("0", "1", "2")
    assert [layer.residency for layer in layers] == ["packed"] * 3 + ["int8"] * 10
    assert "residency=int8" in repr(layers[3])
    assert "residency" not in repr(layers[0])
    assert set_residency(model, "dense") == ()


def test_a_residency_survives_casts_copies_and_a_block_of_dense_weights() -> None:
    x = torch.randn(3, 40)
    for residency in RESIDENCIES:
        model = quantized(nn.Linear(40, 12, bias=False), "kmeans-channel-4")  # casting a bias back and forth rounds it
        wide, narrow = model(x), copy.deepcopy(model).bfloat16()(x.bfloat16())
        set_residency(model, residency)  # type: ignore[arg-type]
        for again in (model, copy.deepcopy(model)):
            assert torch.equal(again.bfloat16()(x.bfloat16()), narrow)
            assert again[0].residency == residency
            with dense_weights(again):
                assert again[0].residency == "dense"
            assert again[0].residency == residency
            assert torch.equal(again.to("cpu", torch.float32)(x), wide)


def test_moving_takes_along_what_is_kept_and_loading_bytes_makes_it_anew(tmp_path: Path) -> None:
    first, second = (quantized(nn.Linear(40, 12), "uniform-channel-5") for _ in range(2))
    x = torch.randn(3, 40)
    for residency in RESIDENCIES:
        model = copy.deepcopy(first)
        set_residency(model, residency)  # type: ignore[arg-type]
        save_file(model.state_dict(), tmp_path / residency)
        model.load_state_dict(second.state_dict())
        assert torch.equal(model(x), second(x))
        model.to("meta")
        assert model[0]._kept is None or model[0]._kept.device.type == "meta"
        model.to_empty(device="cpu").load_state_dict(first.state_dict())
        assert torch.equal(model(x), first(x))
        assert model[0].residency == residency
    files = [(tmp_path / residency).read_bytes() for residency in FORMS]
    assert all(file == files[0] for file in files)


@pytest.mark.parametrize("residency", FORMS)
def test_gradients_are_those_of_the_packed_layer(residency) -> None:
    model = quantized(nn.Linear(40, 12), "kmeans-channel-3")
    x, y = (torch.ones(3, 40, requires_grad=True) for _ in range(2))
    (model(x) * model(2 * x)).sum().backward()
    with torch.inference_mode():
        set_residency(model, residency)
    (model(y) * model(2 * y)).sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("residency", FORMS)
@pytest.mark.parametrize("label", ["uniform-group7-4", "kmeans-channel-3"])
def test_every_residency_compiles_without_graph_breaks(residency, label: str) -> None:
    model = quantized(nn.Conv2d(6, 10, 3), label, split=4)
    x = torch.randn(2, 6, 8, 8)
    set_residency(model, residency)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


def test_bad_requests_are_refused() -> None:
    model = quantized(nn.Linear(40, 12), "kmeans-channel-3")
    with pytest.raises(QuantDMError, match="got 'int4'"):
        set_residency(model, "int4")  # type: ignore[arg-type]
    with pytest.raises(QuantDMError, match=r"no packed layers; apply_recipe"):
        set_residency(nn.Sequential(nn.Linear(3, 3)), "dense")
    set_residency(model, "int8")
    bytes_ = model[0].packed
    model[0].packed = nn.Parameter(bytes_.to("meta"), requires_grad=False)  # as an offload hook does it
    with pytest.raises(QuantDMError, match=r"int8 residency: the weight is kept on cpu.*before offloading"):
        model(torch.ones(3, 40))
    with pytest.raises(QuantDMError, match="0: its bytes are offloaded"):
        set_residency(model, "dense")
    assert packed_layers(model)["0"].residency == "int8"
