"""The kernel that decodes packed weights on an accelerator: the same bits as the eager path.

Without an accelerator its arithmetic is run by Triton's interpreter, where Triton is installed.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from quantdm.modules import quantize_module_
from quantdm.modules.packed import PackedLayer
from quantdm.quantizers import fused, quantize_weight
from quantdm.quantizers.weight import QuantizedWeight, _decode_half_, halves, parameters_of
from quantdm.schemes import Scheme

LABELS = [
    *(f"uniform-channel-{bits}" for bits in (2, 3, 4, 5, 6, 7, 8)),
    *(f"kmeans-channel-{bits}" for bits in (2, 3, 4, 5, 6, 7, 8)),
    "uniform-group32-5", "uniform-channel-4-symmetric", "uniform-tensor-4", "kmeans-group32-3", "kmeans-channel-4-fp16",
    "kmeans-tensor-6", "kmeans-tensor-7-int8", "kmeans-shared-4", "kmeans-shared32-3", "uniform-tensor-8-symmetric",
    "uniform-group32-3-symmetric", "log2-channel-4", "log2-tensor-6", "log2-group32-3-halfsteps",
]  # fmt: skip
# Weights whose groups end short, whose columns are no power of two, and which are two halves.
SHAPES = (((24, 80), None), ((33, 12, 3, 3), None), ((16, 40, 3, 3), 24))
GRAPHED = ("kmeans-channel-4", "uniform-channel-4", "kmeans-shared32-3")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="wants Triton")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="wants an accelerator")


def packed(label: str) -> PackedLayer:
    """Return a packed layer in bfloat16 on the accelerator; its inputs have 96 channels."""
    model = nn.Sequential(nn.Linear(96, 64)).to("cuda", torch.bfloat16)
    quantize_module_(model, "0", example(label, (64, 96), None).to(torch.device("cuda")))
    own = model[0]
    assert isinstance(own, PackedLayer)
    return own


def kernel_of(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Decode a weight by the kernel alone, whatever is decided elsewhere."""
    out = torch.full(weight.shape, torch.nan, dtype=dtype, device=weight.tensors["factor" + _first(weight)].device)
    matrix = out.view(weight.shape[0], -1)
    for suffix, columns in halves(weight.shape, weight.split):
        tensors = {name: weight.tensors[name + suffix] for name in parameters_of(weight.scheme)}
        assert fused._serves(matrix[:, columns], weight.scheme, tensors)
        fused._launch(matrix[:, columns], weight.scheme, tensors, torch.finfo(weight.dtype).max)
    return out


def _first(weight: QuantizedWeight) -> str:
    return "" if weight.split is None else ".0"


def example(label: str, shape: tuple[int, ...], split: int | None) -> QuantizedWeight:
    """Return a random weight with outliers under a scheme."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight.view(-1)[::97] *= 20
    return quantize_weight(weight, Scheme.parse(label), split=split)


def check(device: str, labels: list[str]) -> None:
    """Compare the kernel with the eager path, bit by bit, in every dtype; the interpreter cuts bfloat16 off."""
    for label in labels:
        for shape, split in SHAPES:
            weight = example(label, shape, split)
            for dtype in (torch.float32, torch.float16, *([] if device == "cpu" else [torch.bfloat16])):
                found, expected = (
                    kernel_of(weight.to(torch.device(device)), dtype).cpu(),
                    weight.dequantize(dtype=dtype),
                )
                assert torch.equal(bits_of(found), bits_of(expected)), (label, shape, dtype)
    saturated = at_the_edge()
    found = kernel_of(saturated.to(torch.device(device)), torch.float32).cpu()
    assert found.abs().max() == torch.finfo(torch.float16).max
    assert torch.equal(found, saturated.dequantize(dtype=torch.float32))


def bits_of(values: torch.Tensor) -> torch.Tensor:
    """Return the bits of floats, which tell -0 from 0."""
    return values.view({2: torch.int16, 4: torch.int32}[values.element_size()])


def at_the_edge() -> QuantizedWeight:
    """Return a weight of fp16 whose grid reaches beyond what fp16 has."""
    weight = torch.linspace(-1, 1, 24 * 80).mul(65504).view(24, 80).half()
    found = quantize_weight(weight, Scheme.parse("uniform-channel-4"))
    found.tensors["scale"].mul_(1.5)
    return found


def check_itself() -> None:
    """Run what a device is asked for on the processor; float32 instead of the bfloat16 of the interpreter."""
    for label, dtype in fused._EXAMPLES:
        known = torch.float32 if dtype == torch.bfloat16 else dtype
        assert fused._is_right(Scheme.parse(label), known, torch.device("cpu")), label


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the device itself is asked")
def test_the_kernel_gives_the_bits_of_the_eager_path_in_the_interpreter() -> None:
    script = "from tests.test_fused import LABELS, check, check_itself; check_itself(); check('cpu', LABELS)"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


@needs_cuda
@pytest.mark.parametrize("label", LABELS)
def test_the_kernel_gives_the_bits_of_the_eager_path_on_the_device(label: str) -> None:
    assert fused._works(torch.device("cuda", torch.cuda.current_device()))
    check("cuda", [label])


@torch.no_grad()
@needs_cuda
@pytest.mark.parametrize(
    "label", [*GRAPHED, "log2-channel-4", "kmeans-channel-4-hadamard", "uniform-channel-4-lowrank-4"]
)
@pytest.mark.parametrize("kernel", [True, False])
def test_packed_layers_can_be_captured_in_a_graph(label: str, kernel: bool, monkeypatch) -> None:
    monkeypatch.setattr(fused, "wanted", kernel)
    if not kernel and label.startswith("log2"):
        pytest.skip("operation by operation the grid of log2 is copied from the processor at every call")
    layer, x = packed(label), torch.randn(3, 96, device="cuda", dtype=torch.bfloat16)
    expected = layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, layer(x))


@torch.no_grad()
@needs_cuda
@pytest.mark.parametrize("label", GRAPHED)
def test_compiled_layers_give_what_plain_ones_give_on_the_device(label: str) -> None:
    layer, x = packed(label), torch.randn(3, 96, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def test_what_the_kernel_cannot_read_or_write_is_left_to_the_eager_path() -> None:
    weight, out = example("kmeans-channel-4", (24, 80), None), torch.empty(24, 80)
    scheme, tensors = weight.scheme, weight.tensors
    assert fused._serves(out, scheme, tensors)
    assert fused._serves(torch.empty(24, 160)[:, 80:], scheme, tensors)
    assert not fused._serves(torch.empty(80, 24).t(), scheme, tensors)
    assert not fused._serves(out.double(), scheme, tensors)
    assert not fused._serves(torch.empty(25, 80), scheme, tensors)  # it would read beyond the codes
    assert not fused._serves(out, scheme, tensors | {"scale": torch.ones(24, 2).half()[:, :1]})
    assert not fused._serves(out, scheme, tensors | {"factor": tensors["factor"].to("meta")})


class _OnDevice(torch.Tensor):
    """A tensor that says that it is on an accelerator."""

    is_cuda = True  # pyright: ignore[reportAssignmentType]


def test_the_kernel_is_launched_on_the_device_of_the_weight_and_a_capture_asks_nothing(monkeypatch) -> None:
    """Triton launches on the current device whatever its arguments are, and a capture allows no copy from it."""
    weight, state = example("kmeans-channel-4", (24, 80), None), {"device": None, "capturing": False}
    launched: list[object] = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        before, state["device"] = state["device"], device
        yield
        state["device"] = before

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(fused, "_works", lambda device: not fused._asked.add(device))
    monkeypatch.setattr(fused, "_asked", set())
    monkeypatch.setattr(fused, "_launch", lambda *given: launched.append(state["device"]))
    out = torch.empty(24, 80).as_subclass(_OnDevice)
    given = (out, weight.scheme, weight.tensors, 1.0)
    for capturing, served in ((True, False), (False, True), (True, True)):
        state["capturing"] = capturing
        assert fused.decode_(*given) == served
    assert launched == [out.device] * 2
    monkeypatch.setattr(fused, "wanted", False)
    assert not fused.decode_(*given)
    assert len(launched) == 2


@pytest.mark.parametrize(("label", "dtype"), fused._EXAMPLES)
def test_what_a_device_is_asked_for_is_what_the_eager_path_gives(label: str, dtype: torch.dtype) -> None:
    scheme = Scheme.parse(label)
    tensors, out = fused._example(scheme), torch.empty(fused._LINES, fused._WIDTH, dtype=dtype)
    assert tensors.keys() == set(parameters_of(scheme))
    _decode_half_(out, scheme, tensors, fused._LIMIT)
    assert torch.equal(out, fused._expected(scheme, tensors).to(dtype))


def test_what_a_device_is_asked_for_has_every_width_and_dtype_and_saturates() -> None:
    schemes = [Scheme.parse(label) for label, _ in fused._EXAMPLES]
    assert {scheme.bits for scheme in schemes} == set(range(2, 9))
    assert {dtype for _, dtype in fused._EXAMPLES} == set(fused.DTYPES)
    reach = [fused._expected(scheme, fused._example(scheme)).abs().max() for scheme in schemes]
    assert max(reach) == fused._LIMIT


def test_on_the_processor_it_does_nothing() -> None:
    weight = example("kmeans-channel-4", (24, 80), None)
    assert not fused.decode_(torch.empty(24, 80), weight.scheme, weight.tensors, 1.0)


def test_blocks_are_no_longer_than_a_plane_and_leave_few_lanes_idle() -> None:
    assert fused._block(1152, 4, 1152 * 1152) == 256 or fused._block(1152, 4, 1152 * 1152) == 128
    assert fused._block(4608, 4, 4608 * 1152) in (512, 256)
    assert fused._block(1000, 3, 1000) in (64, 32, 16)  # the smaller plane of 3 bits has 125 bytes
    assert fused._block(8, 2, 16) is None


def test_a_device_without_triton_is_decoded_eagerly_and_says_so(monkeypatch, caplog) -> None:
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    fused._works.cache_clear()
    with caplog.at_level("WARNING", logger="quantdm"):
        assert not fused._works(torch.device("cuda:7"))
    assert "Triton is not installed" in caplog.text
    fused._works.cache_clear()


def test_a_kernel_that_answers_wrongly_is_not_used(monkeypatch, caplog) -> None:
    monkeypatch.setattr(fused, "find_spec", lambda name: object())
    monkeypatch.setattr(fused, "_is_right", lambda scheme, dtype, device: scheme.method != "kmeans")
    monkeypatch.setattr(fused, "_grid", lambda *asked: None)
    fused._works.cache_clear()
    with caplog.at_level("WARNING", logger="quantdm"):
        assert not fused._works(torch.device("cuda:7"))
    assert "wrong for kmeans-channel-2-fp16, kmeans-shared32-3" in caplog.text
    fused._works.cache_clear()


def test_the_grids_of_log2_are_there_before_a_capture_could_need_them(monkeypatch) -> None:
    made = set()
    monkeypatch.setattr(fused, "find_spec", lambda name: object())
    monkeypatch.setattr(fused, "_is_right", lambda scheme, dtype, device: True)
    monkeypatch.setattr(fused, "_grid", lambda bits, half_steps, device: made.add((bits, half_steps, str(device))))
    fused._works.cache_clear()
    assert fused._works(torch.device("cuda:7"))
    assert made == {(bits, half, "cuda:7") for bits in range(2, 9) for half in (False, True)}
    fused._works.cache_clear()
