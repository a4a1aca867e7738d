"""Packed layers compute what the torch layer with the decoded weight computes, and let nobody change their bytes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quantdm.errors import QuantDMError
from quantdm.modules import (
    QuantConv2d,
    QuantLinear,
    dense_weights,
    dequantize_module_,
    packed_layers,
    quantize_module_,
)
from quantdm.modules.blob import ALIGNMENT, blob_size, join_tensors, split_blob
from quantdm.quantizers import QuantizedWeight, quantize_weight
from quantdm.schemes import Scheme

LABELS = (
    "uniform-channel-2",
    "uniform-group8-5",
    "uniform-tensor-8",
    "kmeans-channel-3",
    "kmeans-tensor-4",
    "kmeans-group16-7",
    "log2-channel-6",
)
LAYERS = {
    "linear": (lambda: nn.Linear(34, 12), (3, 5, 34)),
    "linear without bias": (lambda: nn.Linear(34, 12, bias=False), (3, 34)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 3, padding=1), (2, 6, 9)),
    "conv2d strided": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (2, 6, 8, 8)),
    "conv2d grouped": (lambda: nn.Conv2d(6, 10, 3, groups=2), (2, 6, 8, 8)),
    "conv2d circular": (lambda: nn.Conv2d(6, 10, 3, padding=2, padding_mode="circular"), (2, 6, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2), (2, 6, 4, 4, 4)),
}


class Scaled(nn.Linear):
    """A subclass with its own forward, as some diffusers models have."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input.to(self.weight.dtype), 2 * self.weight, self.bias)


def quantize(
    layer: nn.Module, label: str = "kmeans-channel-3", split: int | None = None
) -> tuple[nn.Module, QuantizedWeight]:
    """Return a model with one packed layer, `0`, and the weight in it."""
    model = nn.Sequential(layer)
    quantized = quantize_weight(layer.weight, Scheme.parse(label), split=split, name="0")
    quantize_module_(model, "0", quantized)
    return model, quantized


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("label", LABELS)
def test_a_packed_layer_equals_the_torch_layer_with_the_decoded_weight(
    label: str, kind: str, dtype: torch.dtype
) -> None:
    make, shape = LAYERS[kind]
    layer = make().to(dtype)
    reference = copy.deepcopy(layer)
    model, quantized = quantize(layer, label)
    reference.weight.data = quantized.dequantize()
    x = torch.randn(shape, dtype=dtype)
    assert torch.equal(model[0].dequantize(), quantized.dequantize())
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(model(x), reference(x))


@pytest.mark.parametrize("label", LABELS)
def test_the_two_halves_of_a_long_skip_weight_survive_packing(label: str) -> None:
    layer = nn.Conv2d(10, 8, 3)
    layer.weight.data[:, 6:] *= 50  # one quantizer for both halves would lose the first
    model, quantized = quantize(layer, label, split=6)
    assert model[0].split == 6
    assert torch.equal(model[0].dequantize(), quantized.dequantize())
    assert torch.equal(model[0].quantized.dequantize(dtype=torch.bfloat16), quantized.dequantize(dtype=torch.bfloat16))


@pytest.mark.parametrize("split", [None, 3])
@pytest.mark.parametrize("label", LABELS)
def test_a_blob_gives_back_its_tensors_and_wastes_less_than_the_alignment(label: str, split: int | None) -> None:
    scheme, shape = Scheme.parse(label), (7, 9)
    quantized = quantize_weight(torch.randn(shape), scheme, split=split)
    blob = join_tensors(quantized.tensors, shape, scheme, split)
    tensors = split_blob(blob, shape, scheme, split)
    assert tensors.keys() == quantized.tensors.keys()
    assert all(torch.equal(tensors[key], quantized.tensors[key]) for key in tensors)
    assert blob.numel() == blob_size(shape, scheme, split) < quantized.nbytes + ALIGNMENT
    assert blob.numel() % ALIGNMENT == 0
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors.values()} == {blob.untyped_storage().data_ptr()}


def test_layers_that_share_the_decoding_buffer_do_not_disturb_each_other() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 8), nn.Linear(8, 30))
    reference = copy.deepcopy(model)
    for name in "012":
        quantized = quantize_weight(model[int(name)].weight, Scheme.parse("uniform-channel-4"))
        reference[int(name)].weight.data = quantized.dequantize()
        quantize_module_(model, name, quantized)
    x = torch.randn(4, 20)
    with torch.no_grad():
        first, second = model(x), model(2 * x)
        assert torch.equal(first, reference(x))
        assert torch.equal(second, reference(2 * x))


def test_gradients_reach_the_input_and_the_bias_but_no_code() -> None:
    layer = nn.Linear(20, 6)
    reference = copy.deepcopy(layer)
    model, quantized = quantize(layer)
    reference.weight.data = quantized.dequantize()
    x, y = (torch.ones(3, 20, requires_grad=True) for _ in range(2))
    (model(x) * model(2 * x)).sum().backward()
    (reference(y) * reference(2 * y)).sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(model[0].bias.grad, reference.bias.grad)
    assert not model[0].packed.requires_grad


def test_casting_a_layer_moves_its_weight_dtype_and_leaves_its_bytes() -> None:
    model, quantized = quantize(nn.Linear(20, 6))
    before = model[0].packed.clone()
    for cast, dtype in ((model.bfloat16, torch.bfloat16), (model.half, torch.float16), (model.float, torch.float32)):
        cast()
        assert torch.equal(model[0].packed, before)
        assert (model[0].weight.dtype, model[0].bias.dtype) == (dtype, dtype)
        assert torch.equal(model[0].dequantize(), quantized.dequantize(dtype=dtype))
    model.type(torch.float16)  # which calls `.type` on bytes too
    assert torch.equal(model[0].packed, before)
    assert (model[0].weight.dtype, model[0].bias.dtype) == (torch.float16, torch.float16)


def test_the_weight_answers_dtype_device_and_shape_without_decoding() -> None:
    model, _ = quantize(nn.Conv2d(3, 5, 3).bfloat16())
    # Bytes on the meta device cannot be decoded, so whatever answers here did not decode.
    model[0].packed = nn.Parameter(model[0].packed.to("meta"), requires_grad=False)
    weight = model[0].weight
    assert (weight.dtype, weight.device.type, weight.shape) == (torch.bfloat16, "meta", (5, 3, 3, 3))
    assert (weight.ndim, weight.numel(), weight.size(0), weight.requires_grad) == (4, 135, 5, False)
    assert weight.is_meta


def test_torch_functions_and_tensor_methods_see_the_decoded_weight() -> None:
    model, quantized = quantize(nn.Linear(20, 6))
    weight, dense = model[0].weight, quantized.dequantize()
    x = torch.randn(3, 20)
    assert torch.equal(F.linear(x, weight), F.linear(x, dense))
    assert torch.equal(torch.cat([weight, weight]), torch.cat([dense, dense]))
    assert torch.equal(weight.data.clone(), dense)
    assert torch.equal(weight.float().T, dense.T)
    assert torch.equal(weight + dense, dense + dense)
    assert torch.equal(2 - weight[1], 2 - dense[1])
    assert torch.equal(x @ -weight.T, x @ -dense.T)
    assert not hasattr(weight, "_private_mark")


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(6, 20))),
        lambda layer: setattr(layer, "weight", torch.zeros(6, 20)),
        lambda layer: setattr(layer.weight, "data", torch.zeros(6, 20)),
        lambda layer: exec("layer.weight.data += 1"),
        lambda layer: exec("layer.weight += 1"),
        lambda layer: layer.weight.add_(1),
        lambda layer: layer.weight.__setitem__(0, 1),
        lambda layer: layer.weight.data.copy_(torch.zeros(6, 20)),
        lambda layer: nn.init.zeros_(layer.weight),
        lambda layer: torch.relu_(layer.weight),
        lambda layer: torch.add(torch.zeros(6, 20), 1, out=layer.weight),
    ],
    ids=["parameter", "tensor", "data", "data +=", "+=", "add_", "setitem", "data.copy_", "init", "relu_", "out="],
)
def test_writing_into_the_weight_is_refused(write) -> None:
    model, quantized = quantize(nn.Linear(20, 6))
    with pytest.raises(QuantDMError, match="dequantize"):
        write(model[0])
    assert torch.equal(model[0].dequantize(), quantized.dequantize())


def test_dense_weights_are_kept_inside_the_block_only() -> None:
    model, quantized = quantize(nn.Linear(20, 6))
    x, keys = torch.randn(3, 20), list(model.state_dict())
    packed = model(x)
    with pytest.raises(RuntimeError, match="stop"), dense_weights(model):  # noqa: PT012 (the block must raise midway)
        with torch.no_grad():
            assert model[0].dense_weight() is model[0].dense_weight()
        assert torch.equal(model(x), packed)
        assert list(model.state_dict()) == keys
        with dense_weights(model):
            pass
        assert model[0].dense_weight() is model[0].dense_weight()  # the inner block took nothing away
        model.bfloat16()
        assert torch.equal(model[0].dense_weight(), quantized.dequantize(dtype=torch.bfloat16))
        raise RuntimeError("stop")
    assert model[0].dense_weight() is not model[0].dense_weight()


@pytest.mark.parametrize("kind", LAYERS)
def test_dequantize_gives_the_torch_layer_back(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer = make()
    kept = {key: value for key, value in layer.__dict__.items() if not isinstance(value, dict)}
    model, quantized = quantize(layer)
    y = model(torch.ones(shape))
    dense = dequantize_module_(model, "0")
    assert type(dense) is type(layer)
    assert {key: value for key, value in dense.__dict__.items() if not isinstance(value, dict)} == kept
    assert torch.equal(dense.weight, quantized.dequantize())
    assert torch.equal(model(torch.ones(shape)), y)


def test_a_subclass_keeps_its_own_forward() -> None:
    layer = Scaled(20, 6)
    model, quantized = quantize(layer)
    assert isinstance(model[0], Scaled)
    x = torch.randn(3, 20)
    assert torch.equal(model(x), F.linear(x, 2 * quantized.dequantize(), layer.bias))
    assert type(dequantize_module_(model, "0")) is Scaled


def test_packed_layers_are_the_torch_classes_that_adapters_look_for() -> None:
    linear, conv = quantize(nn.Linear(20, 6))[0][0], quantize(nn.Conv2d(3, 5, 3))[0][0]
    assert isinstance(linear, QuantLinear)
    assert isinstance(linear, nn.Linear)
    assert isinstance(conv, QuantConv2d)
    assert isinstance(conv, nn.Conv2d)
    assert (linear.in_features, conv.kernel_size) == (20, (3, 3))
    # Buffers would stay behind under sequential offload, tensor subclasses break group offload.
    assert [name for name, _ in linear.named_parameters()] == ["bias", "packed"]
    assert type(linear.packed) is nn.Parameter
    assert not list(linear.buffers())


def test_a_deep_copy_is_independent() -> None:
    model, quantized = quantize(nn.Linear(20, 6))
    other = copy.deepcopy(model)
    other.bfloat16()
    other[0].packed.data.zero_()
    assert torch.equal(model[0].dequantize(), quantized.dequantize())
    assert model[0].weight.dtype == torch.float32


def test_compiled_without_graph_breaks_the_output_is_the_same() -> None:
    model, _ = quantize(nn.Linear(20, 6))
    x = torch.randn(3, 20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


def test_bad_replacements_are_refused_and_leave_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(20, 6), nn.LayerNorm(6), nn.Linear(6, 6))
    weight = quantize_weight(torch.randn(6, 20), Scheme.parse("uniform-channel-4"))
    with pytest.raises(QuantDMError, match=r"1: got LayerNorm|LayerNorm"):
        quantize_module_(model, "1", weight)
    with pytest.raises(QuantDMError, match=r"2: got codes for shape \(6, 20\), expected \(6, 6\)"):
        quantize_module_(model, "2", weight)
    hook = model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(QuantDMError, match="0: carries hooks"):
        quantize_module_(model, "0", weight)
    assert not packed_layers(model)
    hook.remove()
    quantize_module_(model, "0", weight)
    with pytest.raises(QuantDMError, match="0: is already quantized"):
        quantize_module_(model, "0", weight)
