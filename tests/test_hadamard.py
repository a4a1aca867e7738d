"""Rotated weights: the rotation's closed forms, and that a rotated scheme is one like any other."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quantdm.modules import quantize_module_
from quantdm.quantizers import Moments, quantize_weight
from quantdm.quantizers.hadamard import block_size, rotate, rotate_moments
from quantdm.quantizers.weight import count_bits
from quantdm.schemes import Scheme
from quantdm.tuning.weights import TunableWeight


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 4, 16, 64, 256])
def test_the_rotation_is_orthogonal_symmetric_and_regular(size: int) -> None:
    matrix = rotate(torch.eye(size, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(matrix, matrix.T)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))
    assert torch.allclose(matrix.sum(1), matrix.sum(1)[0].expand(size))  # no column gathers the mean of a row


@pytest.mark.parametrize(("channels", "block"), [(1152, 64), (640, 64), (320, 64), (256, 256), (1024, 256), (9, 1)])
def test_a_rotated_layer_is_the_plain_layer(channels: int, block: int) -> None:
    assert block_size(channels) == block
    x, w = noise(3, channels).double(), noise(5, channels, seed=1).double()
    assert torch.allclose(rotate(rotate(x)), x, atol=1e-12)
    assert torch.allclose(rotate(x) @ rotate(w).T, x @ w.T, atol=1e-10)
    images = noise(2, channels, 4, 4).double()
    kernel = noise(3, channels, 3, 3, seed=1).double()
    assert torch.allclose(F.conv2d(rotate(images, 1), rotate(kernel, 1)), F.conv2d(images, kernel), atol=1e-8)
    if channels == 9:
        assert torch.equal(rotate(x), x)


def test_the_moments_of_rotated_inputs_are_rotated() -> None:
    x = noise(50, 20 * 4).double()  # 20 channels of 4 positions, seamed at 4
    plain = Moments((x.T @ x / 50)[None], 50)
    turned = rotate(x.view(50, 20, 4), 1, seam=4).reshape(50, -1)
    found = rotate_moments(plain, 20, seam=4)
    assert torch.allclose(found.second[0], turned.T @ turned / 50, atol=1e-10)


LABELS = (
    "uniform-channel-4-hadamard",
    "uniform-group64-3-symmetric-hadamard-feedback",
    "kmeans-channel-3-fp16-hadamard-importance",
    "kmeans-tensor-2-hadamard-feedback",
    "kmeans-shared64-3-hadamard",
    "log2-channel-4-hadamard",
)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize(("shape", "split"), [((6, 128), None), ((6, 128), 48), ((8, 16, 3, 3), 4)])
def test_a_rotated_scheme_decodes_to_about_the_weight_and_costs_no_bits(label, shape, split) -> None:
    scheme = Scheme.parse(label)
    assert scheme.label == label
    weight = noise(*shape)
    n = weight[0].numel()
    x = noise(400, n, seed=2)
    moments = Moments((x.T @ x / 400)[None], 400)
    found = quantize_weight(weight, scheme, split=split, moments=moments)
    plain = Scheme.parse(label.replace("-hadamard", ""))
    assert found.num_bits == count_bits(shape, plain, split)
    dense = found.dequantize()
    assert float((dense - weight).square().mean()) < 0.25
    # In turned coordinates it is a weight of the plain scheme, of the turned weight.
    turned = quantize_weight(
        rotate(weight, 1, seam=split), plain, split=split, moments=rotate_moments(moments, shape[1], seam=split)
    )
    assert torch.equal(rotate(turned.dequantize(dtype=torch.float32), 1, seam=split), dense)
    assert torch.equal(TunableWeight(found)().detach(), dense)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(found.dequantize(dtype=dtype), dense.to(dtype))
    out = torch.empty(shape[::-1], dtype=torch.bfloat16).permute(*reversed(range(len(shape))))
    assert torch.equal(found.dequantize(out=out), dense.bfloat16())


def test_rotation_pays_where_a_few_channels_are_large() -> None:
    weight = noise(32, 256)
    weight[:, 7] *= 40
    error = {
        label: float((quantize_weight(weight, Scheme.parse(label)).dequantize() - weight).square().mean())
        for label in ("uniform-channel-4", "uniform-channel-4-hadamard")
    }
    assert error["uniform-channel-4-hadamard"] < 0.5 * error["uniform-channel-4"]


LAYERS = (torch.nn.Linear(64, 8), torch.nn.Conv2d(16, 8, 3), torch.nn.Conv2d(16, 8, 3, groups=4))


@pytest.mark.parametrize("layer", LAYERS, ids=["linear", "conv", "grouped"])
def test_a_packed_rotated_layer_runs_in_every_residency(layer) -> None:
    holder = torch.nn.Sequential(layer)
    found = quantize_weight(layer.weight, Scheme.parse("uniform-channel-4-hadamard"))
    x = noise(2, 64) if isinstance(layer, torch.nn.Linear) else noise(2, 16, 5, 5)
    expected = torch.func.functional_call(layer, {"weight": found.dequantize()}, (x,))
    packed = quantize_module_(holder, "0", found)
    for residency in ("packed", "int8", "dense"):
        packed.keep_(residency)  # type: ignore[operator]
        with torch.no_grad():
            assert torch.equal(holder(x), expected)
