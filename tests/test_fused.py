"""The kernel that decodes packed weights on an accelerator: the same bits as the eager path.

Without an accelerator its arithmetic is run by Triton's interpreter, where Triton is installed.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from quantdm.quantizers import fused, quantize_weight
from quantdm.quantizers.weight import QuantizedWeight, halves, parameters_of
from quantdm.schemes import Scheme

LABELS = [
    *(f"uniform-channel-{bits}" for bits in (2, 3, 4, 5, 6, 7, 8)),
    *(f"kmeans-channel-{bits}" for bits in (2, 3, 4, 5, 8)),
    "uniform-group32-5", "uniform-channel-4-symmetric", "uniform-tensor-4", "kmeans-group32-3", "kmeans-channel-4-fp16",
    "kmeans-tensor-6", "kmeans-shared-4", "kmeans-shared32-3", "log2-channel-4", "log2-group32-3-halfsteps",
]  # fmt: skip
# Weights whose groups end short, whose columns are no power of two, and which are two halves.
SHAPES = (((24, 80), None), ((33, 12, 3, 3), None), ((16, 40, 3, 3), 24))
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="wants Triton")


def kernel_of(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Decode a weight by the kernel alone, whatever is decided elsewhere."""
    out = torch.full(weight.shape, torch.nan, dtype=dtype, device=weight.tensors["factor" + _first(weight)].device)
    matrix = out.view(weight.shape[0], -1)
    for suffix, columns in halves(weight.shape, weight.split):
        tensors = {name: weight.tensors[name + suffix] for name in parameters_of(weight.scheme)}
        part = matrix[:, columns]
        block = fused._block(part.shape[1], weight.scheme.bits, part.numel())
        assert block is not None
        fused._launch(part, weight.scheme, tensors, torch.finfo(weight.dtype).max, block)
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
                found = kernel_of(weight.to(torch.device(device)), dtype).cpu()
                assert torch.equal(found, weight.dequantize(dtype=dtype)), (label, shape, dtype)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the device itself is asked")
def test_the_kernel_gives_the_bits_of_the_eager_path_in_the_interpreter() -> None:
    script = "from tests.test_fused import LABELS, check; check('cpu', LABELS)"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants an accelerator")
@pytest.mark.parametrize("label", LABELS)
def test_the_kernel_gives_the_bits_of_the_eager_path_on_the_device(label: str) -> None:
    assert fused._works(torch.device("cuda", torch.cuda.current_device()))
    check("cuda", [label])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants an accelerator")
def test_packed_layers_can_be_captured_in_a_graph() -> None:
    weight = example("kmeans-channel-4", (64, 96), None).to(torch.device("cuda"))
    out = torch.empty(weight.shape, device="cuda")
    weight.dequantize(out=out)
    expected, graph = out.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weight.dequantize(out=out)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


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
    monkeypatch.setattr(fused, "_is_right", lambda scheme, device: scheme.method != "kmeans")
    fused._works.cache_clear()
    with caplog.at_level("WARNING", logger="quantdm"):
        assert not fused._works(torch.device("cuda:7"))
    assert "wrong for kmeans-channel-4" in caplog.text
    fused._works.cache_clear()
