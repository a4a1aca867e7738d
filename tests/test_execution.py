"""Integer products are the simulated ones up to rounding; what none can compute stays simulated, and says so."""

import copy
import json
import logging
from collections.abc import Iterable
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantdm.activations import set_activation_bits_
from quantdm.activations.codes import Grid, code_input
from quantdm.activations.handover import input_for, quantize_input, shared_dims
from quantdm.denoisers.inventory import LayerRecord, list_layers
from quantdm.errors import QuantDMError
from quantdm.modules import (
    dense_weights,
    execution,
    measured,
    operators,
    packed_layers,
    quantize_module_,
    set_residency,
)
from quantdm.modules.coded import CodedInput
from quantdm.modules.int8 import int8_form
from quantdm.modules.kernels import Kernel
from quantdm.modules.operators import aligned, int_mm_of
from quantdm.modules.packed import PackedLayer
from quantdm.modules.products import LinearProduct
from quantdm.quantizers import quantize_weight
from quantdm.recipe import ActivationScheme, ActivationSpec
from quantdm.schemes import Scheme
from tests.test_activations import MODELS, run

LAYERS = {
    "linear": (lambda: nn.Linear(37, 29), (3, 11, 37), None),
    "linear without bias": (lambda: nn.Linear(40, 16, bias=False), (5, 40), None),
    "linear of a long skip": (lambda: nn.Linear(40, 16), (2, 9, 40), 24),
    "conv": (lambda: nn.Conv2d(7, 5, 3, padding=1), (2, 7, 9, 8), None),
    "conv grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, stride=2, bias=False), (2, 8, 9, 8), None),
    "conv depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8, padding=2, dilation=2), (2, 8, 9, 8), None),
    "conv of a long skip": (lambda: nn.Conv2d(10, 8, 3, padding=1), (3, 10, 9, 8), 6),
    "conv 1x1": (lambda: nn.Conv2d(9, 8, 1, stride=2), (3, 9, 9, 8), None),
    "conv 1x1 of a long skip": (lambda: nn.Conv2d(10, 8, 1, bias=False), (3, 10, 9, 8), 4),
}
WEIGHTS = (
    "uniform-channel-4",
    "uniform-channel-8",
    "uniform-tensor-3",
    "kmeans-channel-3",
    "kmeans-tensor-5-int8",
    "log2-channel-3",
)
INPUTS = (
    "token-8",
    "token-5-symmetric",
    "token-6-percentile",
    "sample-8",
    "sample-4-mse",
    "tensor-6",
    "tensor-8-static",
)
GIVEN = (-1.5, 2.0)  # the range of static schemes; some values lie outside


def marked(kinds: Iterable[str]) -> list[Any]:
    """Return kinds of layers as parameters of a test that multiplies integers in every one of them."""
    return [
        pytest.param(kind, marks=pytest.mark.integer_convolution if kind.startswith("conv") else ()) for kind in kinds
    ]


@pytest.fixture(autouse=True)
def _seed(monkeypatch, tmp_path) -> None:
    torch.manual_seed(0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured._known.cache_clear()
    execution.say_once.cache_clear()


def record_of(layer: nn.Module, split: int | None = None) -> LayerRecord:
    """Describe a layer as the inventory of a denoiser would."""
    shape: tuple[int, ...] = tuple(layer.weight.shape)  # type: ignore[union-attr]
    kind = "linear" if isinstance(layer, nn.Linear) else f"conv{len(shape) - 2}d"
    return LayerRecord("0", kind, "t", "b", 1, shape, 1 if split is None else 2, split, 0, "s")  # type: ignore[arg-type]


def packed(layer: nn.Module, label: str, split: int | None = None, shift: float = 0.0) -> PackedLayer:
    """Return a layer with a quantized weight."""
    model = nn.Sequential(layer)
    weight = layer.weight.detach() + shift  # type: ignore[operator]
    return quantize_module_(model, "0", quantize_weight(weight, Scheme.parse(label), split=split, name="0"))


def simulated(
    layer: PackedLayer, x: Tensor, record: LayerRecord, scheme: ActivationScheme, given=None, exponents=None
) -> Tensor:
    """Return what rounded floats give, in float64."""
    exact = copy.deepcopy(layer).double()
    exact.keep_("packed")
    rounded = quantize_input(x.float(), record, scheme, given, exponents)
    return exact.forward(rounded.double())


def error(y: Tensor, expected: Tensor) -> float:
    """Return the relative distance of two outputs."""
    return float((y.double() - expected).norm() / expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("kind", marked(LAYERS))
def test_integers_give_what_the_simulation_gives(kind: str, weight: str) -> None:
    make, shape, split = LAYERS[kind]
    for shift in (0.0, 3.0):  # rows far from zero have offsets
        layer = packed(make(), weight, split, shift)
        record = record_of(layer, split)
        layer.keep_("integer")
        assert layer.residency == "integer"
        x = torch.randn(shape) + 1
        for label in INPUTS:
            scheme = ActivationScheme.parse(label)
            given = GIVEN if scheme.static else None
            coded = input_for(layer, x, record, scheme, given)
            assert isinstance(coded, CodedInput)
            assert torch.equal(coded.values(), quantize_input(x, record, scheme, given))
            assert error(layer.forward(coded), simulated(layer, x, record, scheme, given)) < 1e-5, label


WIDTHS = range(2, 9)
EVERY = (
    *(f"uniform-{rows}-{b}{sign}" for rows in ("channel", "tensor") for b in WIDTHS for sign in ("", "-symmetric")),
    *(f"kmeans-{rows}" for b in WIDTHS for rows in (f"channel-{b}", f"tensor-{b}", f"tensor-{b}-int8")),
    *(f"log2-channel-{b}" for b in WIDTHS),
    *(f"uniform-group8-{b}" for b in WIDTHS),
    *("kmeans-shared-3", "kmeans-channel-4-fp16", "uniform-channel-4-hadamard"),
)
# What no integer product computes: no whole multiples of one scale, scales of groups, rotated under plain inputs.
SIMULATED = {
    *(f"kmeans-tensor-{b}" for b in WIDTHS),
    *(f"log2-channel-{b}" for b in WIDTHS if b > 3),
    *(f"uniform-group8-{b}" for b in WIDTHS),
    *("kmeans-shared-3", "kmeans-channel-4-fp16", "uniform-channel-4-hadamard"),
}
EVERY_INPUT = (
    *(f"token-{b}{sign}" for b in range(3, 9) for sign in ("", "-symmetric")),
    *(f"{which}-{b}" for which in ("sample", "tensor") for b in range(3, 9)),
)
GEOMETRIES = {
    "linear": (lambda bias: nn.Linear(37, 29, bias), (3, 11, 37)),
    "linear of one row": (lambda bias: nn.Linear(19, 1, bias), (1, 19)),
    "conv": (lambda bias: nn.Conv2d(7, 5, 3, padding=1, bias=bias), (2, 7, 9, 8)),
    "conv 1x1": (lambda bias: nn.Conv2d(9, 6, 1, bias=bias), (1, 9, 5, 3)),
    "conv grouped": (lambda bias: nn.Conv2d(8, 12, 3, groups=4, stride=2, bias=bias), (2, 8, 9, 8)),
    "conv depthwise": (lambda bias: nn.Conv2d(8, 8, 3, groups=8, dilation=2, bias=bias), (2, 8, 9, 8)),
}


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", marked(GEOMETRIES))
def test_every_method_and_width_gives_in_bf16_what_its_simulation_gives(kind: str, bias: bool) -> None:
    make, shape = GEOMETRIES[kind]
    layer, x, inputs = make(bias).bfloat16(), torch.randn(shape).bfloat16(), cycle(EVERY_INPUT)
    whole = set()
    for weight in EVERY:
        own = packed(copy.deepcopy(layer), weight)
        record = record_of(own)
        own.keep_("integer")
        scheme = ActivationScheme.parse(next(inputs))
        given = input_for(own, x, record, scheme, None)
        if isinstance(given, CodedInput):
            whole.add(weight)
            nearest = simulated(own, x, record, scheme).bfloat16().double()
            assert error(own.forward(given), nearest) <= 1e-3, (weight, scheme)
        else:
            assert torch.equal(given, quantize_input(x, record, scheme)), (weight, scheme)
    assert whole >= set(EVERY) - SIMULATED


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", marked(LAYERS))
def test_narrow_outputs_are_rounded_once(kind: str, dtype: torch.dtype) -> None:
    """Half a step of the dtype at most, where a simulation rounds weights, inputs and outputs."""
    make, shape, split = LAYERS[kind]
    for weight, label in (("kmeans-channel-4", "token-8"), ("uniform-channel-8", "tensor-8")):
        layer, scheme = packed(make(), weight, split).to(dtype), ActivationScheme.parse(label)
        record, x = record_of(layer, split), torch.randn(shape).to(dtype)
        layer.keep_("integer")
        y, expected = layer.forward(input_for(layer, x, record, scheme, None)), simulated(layer, x, record, scheme)
        assert y.dtype == dtype
        nearest = expected.to(dtype).double()
        assert (y.double() - nearest).norm() < 1e-3 * nearest.norm()
        layer.keep_("dense")
        assert error(y, expected) <= 1.05 * error(layer.forward(quantize_input(x, record, scheme)), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", marked(["linear without bias", "linear of a long skip", "conv of a long skip", "conv 1x1 of a long skip"])
)
def test_rotated_weights_multiply_rotated_inputs(kind: str) -> None:
    make, shape, split = LAYERS[kind]
    layer, x = packed(make(), "uniform-channel-4-hadamard", split), torch.randn(shape)
    record = record_of(layer, split)
    layer.keep_("integer")
    for label in ("token-8-hadamard", "tensor-6-hadamard"):
        scheme = ActivationScheme.parse(label)
        coded = input_for(layer, x, record, scheme, None)
        assert isinstance(coded, CodedInput)
        assert error(layer.forward(coded), simulated(layer, x, record, scheme)) < 1e-5
        assert torch.equal(coded.values(), quantize_input(x, record, scheme))


@torch.no_grad()
def test_constant_and_distant_inputs_do_not_overflow() -> None:
    scheme = ActivationScheme.parse("sample-8")
    for make, shape in ((lambda: nn.Linear(640, 8), (2, 3, 640)), (lambda: nn.Conv2d(64, 8, 3), (2, 64, 5, 5))):
        layer = packed(make(), "uniform-channel-8", shift=0.1)
        layer.keep_("integer")
        record = record_of(layer)
        for x in (torch.full(shape, 7.3), 1e4 + torch.rand(shape), torch.zeros(shape)):
            y = layer.forward(input_for(layer, x, record, scheme, None))
            expected = simulated(layer, x, record, scheme)
            assert (y - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "linear of a long skip"])
def test_the_product_for_other_devices_is_the_same(kind: str) -> None:
    """`torch._int_mm` with the alignment that CUDA asks for gives the integers that oneDNN gives."""
    make, shape, split = LAYERS[kind]
    for shift in (0.0, 3.0):
        layer, scheme = packed(make(), "uniform-channel-8", split, shift), ActivationScheme.parse("token-8")
        form, record, x = int8_form(layer.quantized), record_of(layer, split), torch.randn(shape)
        grid = Grid(shared_dims(record, scheme, x.dim()), -1, split, None)
        y = LinearProduct(form, "int_mm")(code_input(x, scheme, grid), layer.bias)
        assert error(y, simulated(layer, x, record, scheme)) < 1e-5


def test_the_product_for_cuda_is_called_as_cuda_asks(monkeypatch) -> None:
    def checked(a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.int8
        assert len(a) > 16
        assert a.shape[1] % 8 == b.shape[1] % 8 == 0
        assert b.t().is_contiguous()
        return a.int() @ b.int()

    monkeypatch.setattr(torch, "_int_mm", checked)
    codes, weight = torch.randint(256, (5, 37)).to(torch.uint8), torch.randint(-128, 128, (13, 37)).to(torch.int8)
    found = int_mm_of(codes, aligned(weight))[:, :13]
    assert torch.equal(found, (codes.int() - 128) @ weight.int().t())


@torch.no_grad()
def test_layers_that_read_one_tensor_share_its_integers() -> None:
    scheme, grid, x = ActivationScheme.parse("token-8"), Grid(-1, -1, None, None), torch.randn(4, 16)
    first = code_input(x, scheme, grid)
    assert code_input(x, scheme, grid) is first
    assert code_input(x, ActivationScheme.parse("token-6"), grid) is not first
    first = code_input(x, scheme, grid)
    x.mul_(2)
    assert code_input(x, scheme, grid) is not first
    assert code_input(x.clone(), scheme, grid) is not first
    with torch.inference_mode():
        hidden = torch.randn(4, 16)
        first = code_input(hidden, scheme, grid)
        hidden.mul_(2)  # which inference tensors do not count
        assert code_input(hidden, scheme, grid) is not first


def quantized_model(name: str) -> nn.Module:
    """Return a tiny denoiser with packed layers, all of them quantized."""
    model = MODELS[name]()
    for record in list_layers(model):
        weight = model.get_parameter(f"{record.name}.weight").detach()
        scheme = Scheme.parse("kmeans-channel-4")
        quantize_module_(model, record.name, quantize_weight(weight, scheme, split=record.split, name=record.name))
    return model


@pytest.mark.integer_convolution
@pytest.mark.parametrize("name", MODELS)
def test_a_denoiser_runs_in_integers_and_goes_back(name: str) -> None:
    model = quantized_model(name)
    plain = run(model)
    set_activation_bits_(model, ActivationSpec(default="token-8"))
    expected = run(model)
    assert set_residency(model, "integer") == ()
    y = run(model)
    assert not torch.equal(y, expected)  # sums in another order
    assert 0 < error(y, expected.double()) < 1e-3  # a tie that falls the other way is one step of one input
    assert all(layer._product is not None for layer in packed_layers(model).values())
    again = copy.deepcopy(model)
    assert torch.equal(run(again), y)
    with dense_weights(model):
        assert torch.equal(run(model), expected)
    assert torch.equal(run(model), y)
    set_activation_bits_(model, None)
    assert torch.equal(run(model), plain)
    set_residency(model, "packed")
    assert torch.equal(run(model), plain)


def test_gradients_and_compiled_graphs_are_those_of_the_simulation() -> None:
    layer, scheme = packed(nn.Linear(40, 12), "kmeans-channel-4"), ActivationScheme.parse("token-6")
    record, x = record_of(layer), torch.randn(3, 40, requires_grad=True)
    layer.register_forward_pre_hook(lambda module, args: (input_for(module, args[0], record, scheme, None),))
    expected = layer(x)
    expected.sum().backward()
    gradient, x.grad = x.grad, None
    layer.keep_("integer")
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, gradient)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="aot_eager")(x), expected)


def messages(caplog) -> list[str]:
    """Return the warnings that were logged since the last call."""
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    caplog.clear()
    return found


@torch.no_grad()
@pytest.mark.integer_convolution
@pytest.mark.parametrize(
    ("make", "shape", "label", "reason"),
    [
        (lambda: nn.Conv2d(4, 6, 3), (2, 4, 8, 8), "map-8", "a scale for every channel"),
        (lambda: nn.Linear(64, 6), (2, 64), "token-8-hadamard", "rotated weights need rotated inputs"),
        (lambda: nn.Linear(64, 6), (2, 64), "token-4-outliers16", "outliers apart"),
        (lambda: nn.Conv2d(4, 6, 1, groups=2), (2, 4, 8, 8), "token-8", "grouped or padded"),
    ],
)
def test_inputs_that_no_product_computes_stay_simulated_and_say_so_once(caplog, make, shape, label, reason) -> None:
    layer, scheme = packed(make(), "uniform-channel-4"), ActivationScheme.parse(label)
    layer.keep_("integer")
    x, record = torch.randn(shape), record_of(layer)
    for _ in range(2):
        given = input_for(layer, x, record, scheme, None)
        assert torch.equal(given, quantize_input(x, record, scheme))
    said = messages(caplog)
    assert len(said) == 1
    assert reason in said[0]


@torch.no_grad()
def test_weights_that_no_product_takes_keep_the_next_best_form_and_are_named() -> None:
    layers = [
        packed(nn.Linear(64, 8), "uniform-group16-4"),
        packed(nn.Linear(64, 8), "kmeans-channel-4-fp16"),
        packed(nn.Conv1d(8, 8, 3), "uniform-channel-4"),
        packed(nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), "uniform-channel-4"),
        packed(nn.Linear(64, 8), "uniform-channel-4"),
    ]
    with pytest.warns(UserWarning, match=r"4 of 5 layers do not multiply integers \(.*every group.*no int8 form"):
        assert set_residency(nn.Sequential(*layers), "integer") == ("0", "1", "2", "3")
    assert [layer.residency for layer in layers] == ["int8", "packed", "int8", "int8", "integer"]
    for layer in layers[:2]:
        scheme, record, x = ActivationScheme.parse("token-8"), record_of(layer), torch.randn(3, 64)
        given = input_for(layer, x, record, scheme, None)
        assert error(layer.forward(given), simulated(layer, x, record, scheme)) < 1e-5


def test_a_device_without_a_right_operator_is_found_out(monkeypatch, caplog) -> None:
    def saturating(codes: Tensor, weight: Tensor) -> Tensor:
        pairs = ((codes.int() - 128)[:, None] * weight.int()).unflatten(-1, (-1, 2)).sum(-1)
        return pairs.clamp(-32_000, 32_000).sum(-1)  # as processors add up pairs that have no VNNI

    def missing(codes: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    for operator in (saturating, missing):
        for name in ("_onednn_linear", "_onednn_conv", "int_mm_of"):
            monkeypatch.setattr(operators, name, operator)
        for cached in (operators.linear_operator, operators.conv_operator):
            cached.cache_clear()
        assert operators.linear_operator("cpu") is None
        assert operators.conv_operator("cpu") is None
        assert len(messages(caplog)) == 2
        model = nn.Sequential(packed(nn.Linear(40, 8), "uniform-channel-4"))
        with pytest.warns(UserWarning, match="cpu has no integer product"):
            assert set_residency(model, "integer") == ("0",)
        assert model[0].residency == "int8"
        assert messages(caplog) == []
    monkeypatch.undo()
    for cached in (operators.linear_operator, operators.conv_operator):
        cached.cache_clear()


@torch.no_grad()
def test_auto_takes_what_is_faster_and_remembers_it(monkeypatch) -> None:
    calls: list[str] = []
    real = measured._measure

    def slow(ways, device):
        calls.append(real(ways, device))
        return answer

    monkeypatch.setattr(measured, "_measure", slow)
    scheme, x = ActivationScheme.parse("token-8"), torch.randn(3, 40)
    for answer, kind in (("integer", CodedInput), ("dense", Tensor)):
        measured._known.cache_clear()
        measured.cache_file().unlink(missing_ok=True)
        layer = packed(nn.Linear(40, 12), "kmeans-channel-4")
        set_residency(nn.Sequential(layer), "auto")
        record = record_of(layer)
        assert layer.residency == "auto"
        expected = simulated(layer, x, record, scheme)
        for _ in range(2):
            given = input_for(layer, x, record, scheme, None)
            assert isinstance(given, kind)
            assert error(layer.forward(given), expected) < 1e-5
        assert (layer._product is None) == (answer == "dense")
        assert isinstance(layer._kept, Tensor) == (answer == "dense")
        measured._known.cache_clear()  # as a new process
        layer.keep_("auto")
        assert isinstance(input_for(layer, x, record, scheme, None), kind)
        assert list(json.loads(measured.cache_file().read_text())["fastest"].values()) == [answer]
        assert layer.forward(x).shape == (3, 12)  # an input that is not quantized
    assert len(calls) == 2
    assert set(calls) <= {"integer", "dense"}


def test_a_damaged_cache_is_measured_again() -> None:
    measured.cache_file().parent.mkdir()
    measured.cache_file().write_text("{")
    device = torch.device("cpu")
    assert measured.remembered("key", device) is None
    ways = {"slow": lambda: torch.randn(2**18).exp(), "fast": lambda: None}
    assert measured.measure("key", ways, device) == "fast"
    measured._known.cache_clear()
    assert measured.remembered("key", device) == "fast"


def test_a_kernel_gives_the_same_in_blocks_and_goes_on_where_it_cannot_be_compiled(monkeypatch, caplog) -> None:
    def add(out: tuple[Tensor], x: Tensor, y: Tensor | None, z: Tensor) -> None:
        out[0].copy_(x + z if y is None else x + y + z)

    def fails(function, **options):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", fails)
    x, y, z = torch.randn(1000, 700), torch.randn(1000, 1), torch.randn(700)
    kernel, out = Kernel(add), torch.empty(1000, 700)
    for wanted in (False, True, True):
        monkeypatch.setattr(Kernel, "wanted", wanted)
        kernel((out,), x, y, z, per_row=2)
        assert torch.equal(out, x + y + z)
        kernel((out,), x, y[:1], z, per_row=2)
        assert torch.equal(out, x + y[0] + z)
    kernel((out,), x, None, z, per_row=2)
    assert torch.equal(out, x + z)
    assert messages(caplog) == ["cannot compile add (no compiler); going on without"]


def test_an_unknown_residency_names_the_nearest() -> None:
    with pytest.raises(QuantDMError, match="integer"):
        set_residency(nn.Sequential(packed(nn.Linear(4, 4), "uniform-channel-4")), "integers")  # type: ignore[arg-type]


@torch.no_grad()
def test_a_weight_that_was_offloaded_to_another_device_is_simulated_and_said_once(caplog) -> None:
    layer = packed(nn.Linear(16, 8), "uniform-channel-4")
    layer.keep_("integer")
    x, record, scheme = torch.randn(5, 16), record_of(layer), ActivationScheme(bits=8)
    coded = input_for(layer, x, record, scheme, None)
    assert isinstance(coded, CodedInput)
    product = layer.forward(coded)
    layer._place = torch.device("cuda")  # as if it had been chosen there before the bytes came here
    with caplog.at_level(logging.WARNING, logger="quantdm"):
        for _ in range(2):
            y = layer.forward(coded)
    assert torch.equal(y, nn.functional.linear(quantize_input(x, record, scheme), layer.dequantize(), layer.bias))
    assert error(product, y.double()) < 1e-5
    said = [record.message for record in caplog.records if "offloading brings weights to cpu" in record.message]
    assert len(said) == 1
