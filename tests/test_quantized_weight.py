"""Quantized weights: honest counting, files, buffers, halves and groups, bad input."""

import math
from pathlib import Path

import pytest
import torch

from quantdm.errors import QuantDMError
from quantdm.files import load_tensors, save_tensors
from quantdm.quantizers import QuantizedWeight, count_bits, quantize_options, quantize_weight, weight_error
from quantdm.quantizers.kmeans import fit_codebook
from quantdm.quantizers.sorted_rows import sort_rows
from quantdm.schemes import Scheme
from tests.random_weights import KINDS, METHODS, decode, gaussian, student

SHAPES = {"linear": (12, 50), "conv2d": (6, 10, 3, 3), "depthwise": (9, 1, 5), "conv3d": (4, 3, 2, 2, 2)}


# --- storage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [None, 1])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_stored_bytes_are_the_counted_bits(method: str, kind: str, shape: tuple[int, ...], split: int | None) -> None:
    split = None if shape[1] == 1 else split
    for bits in (2, 3, 6):
        q = quantize_weight(gaussian(*shape), Scheme.parse(f"{method}-{kind}-{bits}"), split=split)
        assert q.num_bits == count_bits(shape, q.scheme, split)
        assert 0 <= 8 * q.nbytes - q.num_bits < 64 * (1 if split is None else 2)
        assert q.dequantize().shape == shape


def test_overhead_is_that_of_the_paper_plus_one_factor() -> None:
    C, n = 30, 64
    overhead = {
        "uniform-channel-4": 2 * 16 * C,
        "kmeans-channel-4": (2**4 * 8 + 16) * C,
        "kmeans-channel-4-fp16": 2**4 * 16 * C,
        "kmeans-tensor-4": 2**4 * 16,
        "log2-channel-4": 16 * C,
        "uniform-group24-4": 2 * 16 * C * 3,
        "kmeans-channel-7-fp16": 64 * 16 * C,  # k = min(2^b, n)
    }
    for label, bits in overhead.items():
        scheme = Scheme.parse(label)
        assert count_bits((C, n), scheme) == C * n * scheme.bits + bits + 32


def test_average_bits_of_pixart_are_those_of_the_paper() -> None:
    from diffusers import PixArtTransformer2DModel

    with torch.device("meta"):
        denoiser = PixArtTransformer2DModel(
            sample_size=64,
            num_layers=28,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            patch_size=2,
            num_attention_heads=16,
            cross_attention_dim=1152,
            norm_type="ada_norm_single",
            caption_channels=4096,
        )
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    shapes = [tuple(m.weight.shape) for m in denoiser.modules() if isinstance(m, kinds)]
    weights = sum(map(math.prod, shapes))
    assert (len(shapes), weights) == (287, 610_228_224)
    expected = {
        "uniform-channel-4": 4.023,
        "kmeans-channel-4-fp16": 4.181,
        "kmeans-channel-3-fp16": 3.091,
        "kmeans-tensor-4": 4.0,
    }
    for label, avg_bits in expected.items():
        scheme = Scheme.parse(label)
        assert round(sum(count_bits(shape, scheme) for shape in shapes) / weights, 3) == avg_bits


@pytest.mark.parametrize("label", ["uniform-channel-3", "kmeans-tensor-3", "kmeans-group24-5", "log2-channel-4"])
@pytest.mark.parametrize("split", [None, 4])
def test_a_weight_survives_a_file(label: str, split: int | None, tmp_path: Path) -> None:
    q = quantize_weight(gaussian(6, 10, 3, 3), Scheme.parse(label), split=split)
    save_tensors(tmp_path / "q.safetensors", q.tensors)
    tensors, _ = load_tensors(tmp_path / "q.safetensors")
    again = QuantizedWeight.from_tensors(q.scheme, q.shape, q.split, q.dtype, tensors)
    assert torch.equal(again.dequantize(), q.dequantize())


def test_from_tensors_refuses_what_does_not_fit() -> None:
    q = quantize_weight(gaussian(6, 10), Scheme.parse("uniform-channel-3"))
    rest = {k: v for k, v in q.tensors.items() if k != "scale"}
    for tensors, message in (
        (
            rest,
            r"got tensors \['codes', 'factor', 'zero_point'\], expected \['codes', 'factor', 'scale', 'zero_point'\]",
        ),
        (
            rest | {"scale": q.tensors["scale"].float()},
            r"scale is torch.float32 \(6, 1\), expected torch.float16 \(6, 1\)",
        ),
        (rest | {"scale": q.tensors["scale"][:5]}, r"scale is torch.float16 \(5, 1\)"),
    ):
        with pytest.raises(QuantDMError, match=message):
            QuantizedWeight.from_tensors(q.scheme, q.shape, None, q.dtype, tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_decoding_into_a_buffer_gives_the_same_values(method: str, kind: str) -> None:
    for shape, split in (((12, 50), None), ((6, 10, 3, 3), 4)):
        q = quantize_weight(gaussian(*shape), Scheme.parse(f"{method}-{kind}-3"), split=split)
        expected = q.dequantize()
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            out = torch.empty(shape, dtype=dtype)
            assert q.dequantize(out=out) is out
            assert torch.equal(out, expected.to(dtype))
            assert torch.equal(q.dequantize(dtype=dtype), out)
        strided = torch.zeros(*shape, 2)[..., 0]
        assert torch.equal(q.dequantize(out=strided), expected)
        with pytest.raises(QuantDMError, match="out: got"):
            q.dequantize(out=torch.empty(3, 3))


@pytest.mark.parametrize("method", METHODS)
def test_large_weights_decode_piece_by_piece(method: str) -> None:
    weight = gaussian(3, 70_000)  # more than one piece per line
    weight[:, 60_000:] *= 1e-3  # the last piece alone would choose another range
    for kind in ("tensor", "channel", "group100"):
        q = quantize_weight(weight, Scheme.parse(f"{method}-{kind}-2"))
        assert weight_error(weight, q.dequantize()) < 0.2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_float_dtype_comes_back_in_its_dtype(dtype: torch.dtype) -> None:
    weight = gaussian(8, 40).to(dtype)
    for method in METHODS:
        decoded = decode(weight, f"{method}-channel-4")
        assert decoded.dtype == dtype
        assert torch.equal(decoded, decode(weight.float(), f"{method}-channel-4").to(dtype))


# --- halves, groups, shared work -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_split_weight_is_two_weights(method: str, kind: str) -> None:
    weight = torch.cat([gaussian(8, 6, 3, 3), 50 * gaussian(8, 4, 3, 3, seed=1)], dim=1)
    label = f"{method}-{kind}-3"
    halves = torch.cat([decode(weight[:, :6], label), decode(weight[:, 6:], label)], dim=1)
    assert torch.equal(decode(weight, label, split=6), halves)
    assert weight_error(weight[:, :6], decode(weight, label, split=6)[:, :6]) < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_the_last_group_of_a_channel_may_be_shorter(method: str) -> None:
    weight = gaussian(5, 53) * torch.logspace(-2, 0, 53)
    parts = [decode(part.contiguous(), f"{method}-channel-4") for part in weight.split(20, dim=1)]
    assert torch.equal(decode(weight, f"{method}-group20-4"), torch.cat(parts, dim=1))
    assert torch.equal(decode(weight, f"{method}-group64-4"), decode(weight, f"{method}-channel-4"))


def test_options_equal_single_quantizations() -> None:
    weight = student(10, 8, 3, 3, df=4)
    schemes = [Scheme.parse(f"{m}-{kind}-{b}") for b in (2, 4) for kind in KINDS for m in METHODS]
    for split in (None, 3):
        for scheme, q in zip(schemes, quantize_options(weight, schemes, split=split), strict=True):
            single = quantize_weight(weight, scheme, split=split)
            assert q.scheme == scheme
            assert q.tensors.keys() == single.tensors.keys()
            assert all(torch.equal(q.tensors[key], single.tensors[key]) for key in q.tensors)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    weight, threads = student(64, 2000, df=4), torch.get_num_threads()
    schemes = [Scheme.parse(f"{m}-{kind}-3") for m in METHODS for kind in ("tensor", "channel", "group64")]
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append([q.dequantize() for q in quantize_options(weight, schemes)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_weights_are_not_changed() -> None:
    weight = gaussian(6, 20)
    before = weight.clone()
    quantize_options(weight, [Scheme.parse(f"{m}-{kind}-3") for m in METHODS for kind in KINDS])
    assert torch.equal(weight, before)


def test_sorted_rows_are_shared_between_bit_widths() -> None:
    rows = sort_rows(gaussian(4, 50))
    first, _ = fit_codebook(rows, 3)
    fit_codebook(rows, 4)
    assert torch.equal(fit_codebook(rows, 3)[0], first)


# --- the error and bad input -----------------------------------------------------------------------------------------


def test_weight_error_is_relative_and_of_power_2_4() -> None:
    weight = gaussian(30, 40)
    assert weight_error(weight, weight) == 0
    assert weight_error(weight, torch.zeros_like(weight)) == pytest.approx(1)
    assert weight_error(weight, 0.9 * weight) == pytest.approx(0.1**2.4, rel=1e-3)
    assert weight_error(weight, 0.9 * weight, p=2) == pytest.approx(0.01, rel=1e-3)
    assert weight_error(weight * 1e-30, 0.9e-30 * weight) == pytest.approx(0.1**2.4, rel=1e-3)
    assert weight_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
    assert weight_error(torch.zeros(2, 2), torch.ones(2, 2)) == math.inf
    with pytest.raises(QuantDMError, match="shapes"):
        weight_error(weight, weight[:3])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_weights_name_the_layer(value: float) -> None:
    weight = gaussian(4, 4)
    weight[2, 1] = value
    with pytest.raises(QuantDMError, match=r"blocks\.3\.ff: got 1 NaN or infinite weights of 16"):
        quantize_weight(weight, Scheme.parse("kmeans-channel-4"), name="blocks.3.ff")


def test_other_bad_input_is_refused() -> None:
    scheme = Scheme.parse("uniform-channel-4")
    for weight in (torch.zeros(4), torch.zeros(4, 0), torch.zeros(4, 4, dtype=torch.int8)):
        with pytest.raises(QuantDMError, match="expected a float tensor"):
            quantize_weight(weight, scheme)
    with pytest.raises(QuantDMError, match="meta device"):
        quantize_weight(torch.zeros(4, 4, device="meta"), scheme)
    for split in (0, 4, -1):
        with pytest.raises(QuantDMError, match=f"split={split}, expected an input channel between 1 and 3"):
            quantize_weight(torch.zeros(4, 4), scheme, split=split)
