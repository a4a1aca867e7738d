"""Quantizers: optimality, exact cases, orderings, degenerate rows."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantdm.quantizers import kmeans, quantize_weight, weight_error
from quantdm.quantizers.packing import unpack_codes
from quantdm.quantizers.sorted_rows import sort_rows
from quantdm.quantizers.uniform import ALPHAS
from quantdm.schemes import Scheme
from tests.random_weights import KINDS, METHODS, decode, gaussian, student


def mse(weight: Tensor, label: str) -> float:
    return float((weight.double() - decode(weight, label).double()).square().mean())


def optimal_error(row: Tensor, k: int) -> float:
    """Return the squared error of the optimal k-means of one row: the exact dynamic program over all cuts, O(k·n^2)."""
    values, counts = np.unique(row.double().numpy(), return_counts=True)
    n = np.concatenate([[0], counts.cumsum()])
    s = np.concatenate([[0.0], (counts * values).cumsum()])
    size = n[None, :] - n[:, None]
    gain = np.where(size > 0, (s[None, :] - s[:, None]) ** 2 / np.maximum(size, 1), np.where(size == 0, 0.0, -np.inf))
    best = gain[0]
    for _ in range(k - 1):
        best = (best[:, None] + gain).max(axis=0)
    return float((counts * values**2).sum() - best[-1])


# --- k-means against the optimum -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [gaussian(12, 640), student(60, 400, df=4, seed=3)], ids=["gaussian", "student-t(4)"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kmeans_per_channel_is_within_1_percent_of_the_optimum(rows: Tensor, bits: int) -> None:
    error, with_int8 = (
        (rows - decode(rows, f"kmeans-channel-{bits}{table}")).double().square().sum(dim=1) for table in ("-fp16", "")
    )
    optimum = torch.tensor([optimal_error(row, 2**bits) for row in rows])
    ratio = error / optimum
    assert ratio.mean() <= 1.01
    assert ratio.max() <= 1.05
    assert ratio.min() >= 1 - 1e-5  # or the reference is wrong
    assert (with_int8 / optimum).mean() <= 1.015  # 0.06 dB for half the overhead


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_an_int8_table_costs_no_more_than_the_rounding_of_its_entries(bits: int) -> None:
    rows = student(40, 600, df=4, seed=11)
    kept = [decode(rows, f"kmeans-channel-{bits}{table}") for table in ("-fp16", "-int8")]
    fp16, int8 = ((rows - w_hat).double().square().mean(dim=1).sqrt() for w_hat in kept)
    half_step = rows.abs().amax(dim=1) / 111 / 2  # 111.5 is the least of the places that the largest entry may take
    assert (int8 <= fp16 + half_step).all()
    assert bool((int8 > fp16).any())


@pytest.mark.parametrize("df", [1, 4, 100])
def test_kmeans_per_tensor_is_within_a_thousandth_of_the_optimum_on_few_distinct_weights(df: float) -> None:
    weight = student(50, 400, df=df).div(64).bfloat16().float()
    weight = weight.clamp(-1.0, 1.0).mul(512).round().div(512)  # few distinct values: the exact program is quick
    assert mse(weight, "kmeans-tensor-4") * weight.numel() <= 1.001 * optimal_error(weight.flatten(), 16)


@pytest.mark.parametrize("df", [1, 2])
def test_kmeans_finds_the_outliers_of_very_heavy_tails(df: float) -> None:
    rows = student(16, 200, df=df)
    for bits in (2, 4):
        error = (rows - decode(rows, f"kmeans-channel-{bits}-fp16")).double().square().sum(dim=1)
        ratio = error / torch.tensor([optimal_error(row, 2**bits) for row in rows])
        assert ratio.median() <= 1.01
        assert ratio.max() <= 1.5


def test_kmeans_of_many_gaussian_weights_has_the_error_of_the_lloyd_max_quantizer() -> None:
    # The 16 optimal levels for the normal distribution itself have an error of 0.009497 (Max, 1960).
    assert mse(gaussian(100, 2000), "kmeans-tensor-4") == pytest.approx(0.009497, rel=0.01)


def test_kmeans_codes_are_the_nearest_entries_of_the_stored_codebook() -> None:
    weight = gaussian(7, 90)
    for bits in (2, 4, 6):
        stored = quantize_weight(weight, Scheme(method="kmeans", bits=bits)).tensors
        codebook = stored["codebook"].float() * stored["scale"].float()[:, :, None] * stored["factor"]
        codes = unpack_codes(stored["codes"], bits, weight.numel()).view(7, 1, 90).long()
        distance = (weight[:, :, None] - codebook).abs()
        chosen = distance.gather(2, codes[:, 0, :, None])[:, :, 0]
        assert torch.equal(chosen, distance.amin(dim=2))


heavy_tails = st.builds(
    lambda seed, df, scale, shift, sparse, n: (
        (student(4, n, df=df, seed=seed) * scale + shift) * (student(4, n, df=9, seed=seed + 1).abs() > sparse)
    ),
    seed=st.integers(0, 2**20),
    df=st.sampled_from([1.0, 1.5, 3.0, 30.0]),
    scale=st.sampled_from([1e-4, 0.02, 1.0, 300.0]),
    shift=st.sampled_from([0.0, 0.0, 0.5]),
    sparse=st.sampled_from([0.0, 0.0, 1.0]),
    n=st.sampled_from([3, 17, 100, 300]),
)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(weight=heavy_tails, bits=st.integers(2, 6), kind=st.sampled_from(["tensor", "channel", "group32"]))
def test_kmeans_is_never_worse_than_uniform(weight: Tensor, bits: int, kind: str) -> None:
    rounding = (weight.abs().max().item() * 2**-12) ** 2  # of the codebook to fp16
    assert mse(weight, f"kmeans-{kind}-{bits}-fp16") <= mse(weight, f"uniform-{kind}-{bits}") * (1 + 1e-5) + rounding


@pytest.mark.parametrize("n", [17, 40, 300])
@pytest.mark.parametrize("bits", [2, 3])
def test_kmeans_is_never_worse_than_uniform_in_any_row_with_ties(n: int, bits: int) -> None:
    smooth = gaussian(300, n, seed=n)
    lattice = smooth.mul(3).round()  # equal weights make poor local optima
    sparse = smooth * (gaussian(300, n, seed=n + 1).abs() > 1)
    for rows in (smooth, lattice, sparse):
        error, uniform_error = (
            (rows - decode(rows, label)).double().square().mean(dim=1)
            for label in (f"kmeans-channel-{bits}-fp16", f"uniform-channel-{bits}")
        )
        rounding = rows.abs().amax(dim=1).mul(2**-12).square()
        assert (error <= uniform_error * (1 + 1e-5) + rounding).all()


def test_the_start_of_kmeans_follows_the_cube_root_of_the_density() -> None:
    rows = sort_rows(gaussian(8, 640))
    cuts = kmeans._search(rows, kmeans._density_start(rows, 16))
    ratio = (rows.square - kmeans._score(rows, cuts)) / torch.tensor([optimal_error(row, 16) for row in rows.values])
    assert ratio.mean() < 1.3  # equally filled clusters: 3.2


@pytest.mark.parametrize("kind", KINDS)
def test_kmeans_keeps_rows_of_few_distinct_values(kind: str) -> None:
    weight = torch.tensor([-3.0, 0.25, 0.5, 7.0])[torch.arange(12 * 48).mul(7).remainder(4).view(12, 48)]
    weight[3] = 0.25
    for bits in (2, 3, 5):
        assert torch.equal(decode(weight, f"kmeans-{kind}-{bits}-fp16"), weight)


# --- uniform and log2 against their definitions ----------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uniform_keeps_the_best_of_the_ten_ranges(bits: int) -> None:
    rows = student(20, 300, df=3)
    kept = (rows.double() - decode(rows, f"uniform-channel-{bits}")).abs().pow(2.4).mean(dim=1)
    errors = []
    for alpha in ALPHAS:
        low, high = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
        step = (alpha * (high - low) / (2**bits - 1)).half().double()
        zero = torch.round(-alpha * low / step)
        q = (torch.round(rows / step) + zero).clamp(0, 2**bits - 1)
        errors.append((rows - (q - zero) * step).abs().pow(2.4).mean(dim=1))
    best = torch.stack(errors).amin(dim=0)
    assert torch.allclose(kept, best, rtol=1e-3)
    assert bits == 8 or (best < errors[0]).any()  # so that the search matters; 8 bits reach everywhere


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_uniform_keeps_weights_that_lie_on_a_grid(bits: int) -> None:
    q = torch.arange(2**bits).repeat(5, 3).float()
    weight = (q - torch.tensor([0.0, 1.0, 3.0, -40.0, 2.0**bits - 1])[:, None]) * 0.0625
    assert torch.equal(decode(weight, f"uniform-channel-{bits}"), weight)


def test_log2_values_are_zero_or_powers_of_two_times_the_scale() -> None:
    weight = gaussian(9, 70)
    for bits in (2, 3, 4):
        q = quantize_weight(weight, Scheme(method="log2", bits=bits))
        scale = q.tensors["scale"].float() * q.tensors["factor"]
        ratio = q.dequantize().double() / scale
        exponent = torch.log2(ratio[ratio != 0].abs())
        assert torch.equal(exponent, exponent.round())
        assert exponent.max() <= 0
        assert exponent.min() >= 1 - 2 ** (bits - 1)


def test_log2_keeps_powers_of_two_and_rounds_to_the_nearest() -> None:
    weight = torch.tensor([[1.0, 0.5, -0.25, 0.125, -1.0, 0.0, -0.5, 0.0078125]])
    assert torch.equal(decode(weight, "log2-channel-4"), weight)
    between = torch.tensor([[1.0] * 60 + [0.74, 0.76, -0.37, -0.38, 0.003]])
    rounded = torch.tensor([[1.0] * 60 + [0.5, 1.0, -0.25, -0.5, 0.0]])
    assert torch.equal(decode(between, "log2-channel-4"), rounded)


# --- orderings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_error_falls_with_bits(method: str, kind: str) -> None:
    weight = student(16, 96, df=5)
    table = "-fp16" if method == "kmeans" else ""  # rows of an int8 table gain little beyond 5 bits
    errors = [weight_error(weight, decode(weight, f"{method}-{kind}-{bits}{table}")) for bits in range(2, 8)]
    floor = 1.0 if method == "log2" else 0.6  # log2: steps stay a factor of two, more bits only reach further down
    assert all(finer <= max(floor * coarser, 1e-8) for coarser, finer in pairwise(errors))
    assert errors[2] < 0.8 * errors[0]


@pytest.mark.parametrize("method", METHODS)
def test_error_falls_with_finer_granularity(method: str) -> None:
    weight = gaussian(24, 128) * torch.logspace(-2, 0, 24)[:, None] * torch.logspace(-1, 0, 128)
    errors = [weight_error(weight, decode(weight, f"{method}-{kind}-3")) for kind in ("tensor", "channel", "group16")]
    assert errors[0] > errors[1] > errors[2]


def test_channels_do_not_depend_on_one_another() -> None:
    weight = student(300, 40, df=3)
    for label in ("uniform-channel-3", "kmeans-channel-3", "log2-channel-3", "kmeans-group16-2"):
        alone = torch.cat([decode(weight[i : i + 1], label) for i in (0, 150, 299)])
        assert torch.equal(decode(weight, label)[[0, 150, 299]], alone)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exponent", [-100, -30, 40, 110])
def test_any_power_of_two_scales_through(method: str, exponent: int) -> None:
    weight, factor = gaussian(8, 33), 2.0**exponent
    for kind in KINDS:
        assert torch.equal(decode(weight * factor, f"{method}-{kind}-4"), decode(weight, f"{method}-{kind}-4") * factor)


# --- degenerate weights ----------------------------------------------------------------------------------------------

DEGENERATE: dict[str, Callable[[], Tensor]] = {
    "zeros": lambda: torch.zeros(3, 20),
    "constant rows": lambda: torch.tensor([[1.7], [-0.3], [1e-3]]).expand(3, 20).clone(),
    "one weight per row": lambda: torch.tensor([[0.3], [-2.0], [0.0], [1e-4]]),
    "one weight": lambda: torch.tensor([[-0.7]]),
    "one outlier among zeros": lambda: torch.nn.functional.pad(torch.tensor([[5.0], [-3.0]]), (9, 30)),
    "subnormal": lambda: torch.tensor([[1e-40, -1e-40, 0.0, 1.4e-45]] * 2),
    "huge float32": lambda: torch.finfo(torch.float32).max * torch.tensor([[1.0, -1.0, 0.0, 1.0]]),
    "huge float16": lambda: torch.tensor([[65504.0, -65504.0, 0.0, 65504.0]]).half(),
    "huge bfloat16": lambda: torch.tensor([[3.3e38, -3.3e38, 0.0, 3.3e38]]).bfloat16(),
    "rows of very different size": lambda: torch.tensor([[1e4, -1e4, 0.0], [1e-4, -1e-4, 0.0], [1e-9, 0.0, 0.0]]),
}


@pytest.mark.parametrize("make", DEGENERATE.values(), ids=DEGENERATE.keys())
@pytest.mark.parametrize("kind", ["channel", "group8"])
@pytest.mark.parametrize("method", METHODS)
def test_degenerate_rows_stay_near_exact(make: Callable[[], Tensor], kind: str, method: str) -> None:
    weight = make()
    for bits in (2, 3, 4, 8):
        decoded = decode(weight, f"{method}-{kind}-{bits}")
        assert decoded.isfinite().all()
        assert decoded.dtype == weight.dtype
        w, w_hat = weight.double(), decoded.double()
        # Both ends of a symmetric row and zero do not fit on one uniform grid.
        step = 2 * w.abs().amax(dim=1, keepdim=True) / (2**bits - 1) if method == "uniform" else 0.0
        spread = (w.amax(dim=1, keepdim=True) - w.amin(dim=1, keepdim=True)) > 0
        # Far below the largest weight scales are subnormal fp16: an error, but only beside the weight's own tiny row.
        tolerance = 2.0**-11 * w.abs() + step * spread + 2.0**-31 * w.abs().max() + 2.0**-148
        if method == "log2" and bits == 2:  # there is no negative entry but -1
            tolerance = tolerance + w.abs().amax(dim=1, keepdim=True) * 0.5 * spread
        assert ((w - w_hat).abs() <= tolerance).all()


@pytest.mark.parametrize("method", ["uniform", "kmeans"])
def test_rows_far_from_zero_stay_near(method: str) -> None:
    weight = 100 + 0.01 * gaussian(5, 60)
    decoded = decode(weight, f"{method}-channel-4")
    assert ((decoded - weight).abs() / weight).max() < 2**-11
    if method == "uniform":
        assert (decoded - weight).square().mean() < 0.1 * weight.var()


def test_uniform_keeps_constant_16_bit_rows_exactly() -> None:
    weight = torch.tensor([[1.0], [-0.37], [0.0], [0.993]]).bfloat16().expand(4, 30)
    for bits in (2, 4, 8):
        for method in METHODS:
            assert torch.equal(decode(weight, f"{method}-channel-{bits}"), weight)
