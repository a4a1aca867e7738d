"""Calibrated weights: importance, error feedback, shared tables and the options of the grids."""

import math

import pytest
import torch
from torch import Tensor

from quantdm.errors import QuantDMError
from quantdm.quantizers import Moments, QuantizedWeight, count_bits, quantize_options, quantize_weight, stored_tensors
from quantdm.quantizers.kmeans import encode, fit_codebook
from quantdm.quantizers.shared import NF4
from quantdm.quantizers.sorted_rows import sort_rows
from quantdm.schemes import Scheme
from tests.random_weights import decode, gaussian, student

GRIDS = ("uniform-{}-{}", "uniform-{}-{}-symmetric", "kmeans-{}-{}", "log2-{}-{}", "log2-{}-{}-halfsteps")
LABELS = [grid.format(kind, "{}") for grid in GRIDS for kind in ("tensor", "channel", "group24")]
LABELS += ["kmeans-shared-{}", "kmeans-shared24-{}", "kmeans-shared64-{}"]


def correlated(n: int, *, groups: int = 1, rank: int | None = None, seed: int = 0) -> Moments:
    """Moments of inputs that share a few directions and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(groups, rank or max(n // 4, 1), n, generator=generator)
    size = torch.exp(torch.randn(n, generator=generator))
    second = directions.transpose(1, 2) @ directions / directions.shape[1]
    if rank is None:
        second += 0.1 * torch.eye(n)
    return Moments(second * size * size[:, None], 1000)


def output_error(weight: Tensor, decoded: Tensor, moments: Moments) -> float:
    """Return tr((w - w_hat) E[x x^T] (w - w_hat)^T)."""
    G, n = moments.second.shape[:2]
    e = (weight - decoded).double().view(G, -1, n)
    return float((e @ moments.second.double() * e).sum())


def calibrated(weight: Tensor, label: str, moments: Moments, split: int | None = None, sweeps: int = 4) -> Tensor:
    return quantize_weight(weight, Scheme.parse(label), moments=moments, split=split, sweeps=sweeps).dequantize()


# --- error feedback --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_feedback_lowers_the_output_error_on_correlated_inputs(label: str, bits: int) -> None:
    weight, moments = gaussian(16, 96), correlated(96)
    plain, feedback = (
        output_error(weight, calibrated(weight, label.format(bits) + option, moments), moments)
        for option in ("", "-feedback")
    )
    assert feedback < (0.8 if "halfsteps" in label and bits == 2 else 0.5) * plain


@pytest.mark.parametrize("label", LABELS)
def test_feedback_is_plain_rounding_where_inputs_are_uncorrelated(label: str) -> None:
    weight = gaussian(12, 60)
    moments = Moments(torch.diag_embed(torch.linspace(0.1, 3, 60)[None].exp()), 10)
    labels = [f"{label.format(3)}-{c}" for c in ("importance", "feedback")]
    importance, feedback = (calibrated(weight, each, moments, sweeps=0) for each in labels)
    assert torch.allclose(importance, feedback)


def test_feedback_of_two_columns_is_the_closed_form() -> None:
    # The column of the larger input is rounded, the other takes the entry nearest to w_2 + e_1·H_12/H_22.
    weight = torch.tensor([[-3.0, 3.0], [3.0, -3.0], [0.2, 0.4], [1.4, 1.9], [-1.0, 1.0]])
    h11, h12, h22 = 2.0, 1.2, 1.0
    moments = Moments(torch.tensor([[[h11, h12], [h12, h22]]]), 10)
    decoded = calibrated(weight, "kmeans-tensor-2-feedback", moments, sweeps=0)
    table = decoded.unique()
    assert len(table) == 4
    wanted_second = weight[:, 1] + (weight[:, 0] - decoded[:, 0]) * h12 / (h22 + 0.01 * (h11 + h22) / 2)
    for wanted, column in ((weight[:, 0], decoded[:, 0]), (wanted_second, decoded[:, 1])):
        assert torch.equal(table[(wanted[:, None] - table).abs().argmin(dim=1)], column)


@pytest.mark.parametrize("shape", [(12, 8, 3, 3), (12, 20, 3), (6, 4, 2, 2, 2)])
def test_feedback_works_for_convolutions(shape: tuple[int, ...]) -> None:
    weight, moments = gaussian(*shape), correlated(math.prod(shape[1:]))
    errors = [
        output_error(weight, calibrated(weight, f"kmeans-channel-3{o}", moments), moments) for o in ("", "-feedback")
    ]
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("label", ["uniform-channel-3", "kmeans-tensor-3", "kmeans-shared24-3", "kmeans-group24-3"])
def test_grouped_convolutions_take_the_moments_of_their_group(label: str) -> None:
    weight, moments = gaussian(12, 6, 3, 3), correlated(54, groups=3)
    decoded = calibrated(weight, f"{label}-feedback", moments)
    assert output_error(weight, decoded, moments) < 0.6 * output_error(weight, decode(weight, label), moments)
    if "channel" in label:
        alone = Moments(moments.second[1:2], 10)
        assert torch.equal(decoded[4:8], calibrated(weight[4:8], f"{label}-feedback", alone))


def test_depthwise_convolutions_have_one_input_each() -> None:
    weight, moments = gaussian(20, 1, 3, 3), correlated(9, groups=20)
    errors = [
        output_error(weight, calibrated(weight, f"uniform-channel-3{o}", moments), moments) for o in ("", "-feedback")
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("calibration", ["importance", "feedback"])
def test_dead_inputs_and_few_samples_are_no_trouble(calibration: str) -> None:
    weight, moments = gaussian(8, 64), correlated(64, rank=3)
    second = moments.second.clone()
    second[:, 10:20], second[:, :, 10:20] = 0, 0
    for each in (second, torch.zeros_like(second)):
        decoded = calibrated(weight, f"uniform-channel-4-{calibration}", Moments(each, 3))
        assert decoded.isfinite().all()
        assert (decoded - weight)[:, 10:20].abs().max() < 2  # rounded like any other


# --- importance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("label", LABELS)
def test_importance_lowers_the_weighted_error(label: str, bits: int) -> None:
    weight = gaussian(16, 96)
    moments = Moments(torch.diag_embed(torch.randn(1, 96, generator=torch.Generator().manual_seed(3)).exp()), 10)
    squared = "-p2" if "uniform" in label or "log2" in label else ""
    plain = label.format(bits) + squared
    errors = [
        output_error(weight, calibrated(weight, each, moments), moments)
        for each in (plain, f"{label.format(bits)}-importance")
    ]
    assert errors[1] <= errors[0] * 1.005  # beyond the rounding of the stored entries


def test_equal_importance_changes_nothing() -> None:
    rows = student(10, 200, df=4)
    for bits in (2, 4, 6):
        usual, weighted = (
            fit_codebook(ordered, bits)[0] for ordered in (sort_rows(rows), sort_rows(rows, rows * 0 + 1))
        )
        errors = [(rows - c.gather(1, encode(rows, c).long())).square().sum(dim=1) for c in (usual, weighted)]
        assert (errors[1] / errors[0]).mean() == pytest.approx(1, abs=0.01)
    weight = gaussian(8, 50)
    even = Moments(torch.eye(50)[None], 10)
    assert torch.equal(calibrated(weight, "uniform-channel-3-importance", even), decode(weight, "uniform-channel-3-p2"))


def test_planted_important_columns_are_kept() -> None:
    weight = gaussian(8, 200)
    weight[:, :4] = torch.tensor([0.111, 0.222, 0.333, 0.444])
    importance = torch.ones(1, 200)
    importance[:, :4] = 1e5
    moments = Moments(torch.diag_embed(importance), 10)
    for label in ("kmeans-channel-3", "kmeans-channel-3-fp16"):
        kept = calibrated(weight, f"{label}-importance", moments)[:, :4]
        assert (kept - weight[:, :4]).abs().max() < 0.02
        assert (decode(weight, label)[:, :4] - weight[:, :4]).abs().max() > 0.05


# --- shared tables ---------------------------------------------------------------------------------------------------


def nf4_error(weight: Tensor, size: int) -> float:
    """Return the squared error of NF4 with double quantization: 8 bits per scale, 32 for every 256 of them."""
    rows, table = weight.view(-1, size), torch.tensor(NF4)
    scale = rows.abs().amax(dim=1)
    chunks = torch.nn.functional.pad(scale, (0, -len(scale) % 256)).view(-1, 256)
    step = chunks.amax(dim=1, keepdim=True) / 255
    scale = (chunks / step).round().mul(step).view(-1)[: len(scale), None]
    codes = encode((rows / scale).view(1, -1), table[None]).view(rows.shape)
    return float((rows - table[codes.long()] * scale).double().square().sum())


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("df", [3, 4, 1000])
def test_a_shared_table_beats_nf4_at_fewer_bits(df: float, size: int) -> None:
    weight = student(128, 512, df=df)
    scheme = Scheme.parse(f"kmeans-shared{size}-4")
    error = float((weight - decode(weight, scheme.label)).double().square().sum())
    assert error < 0.9 * nf4_error(weight, size)
    scales = weight.numel() // size
    table = 16 * 16 + 32
    assert count_bits(weight.shape, scheme) == weight.numel() * 4 + scales * 8 + math.ceil(scales / 256) * 16 + table
    assert count_bits(weight.shape, scheme) <= weight.numel() * 4 + scales * 8 + math.ceil(scales / 256) * 32 + table


def test_a_shared_table_keeps_weights_that_nf4_keeps() -> None:
    table = torch.tensor(NF4)
    codes = torch.randint(0, 16, (64, 64), generator=torch.Generator().manual_seed(0))
    codes[:, ::32] = 15
    weight = table[codes] * torch.tensor([1.0, 0.5])[torch.arange(64) % 2, None]
    error = (decode(weight, "kmeans-shared32-4") - weight).square().mean() / weight.square().mean()
    assert error < 1e-4


def test_shared_scales_have_a_sign() -> None:
    lopsided = torch.tensor([1.0, 0.2, 0.1, -0.1]).repeat(16, 16)
    weight = torch.cat([lopsided, -lopsided])
    stored = quantize_weight(weight, Scheme.parse("kmeans-shared16-2")).tensors
    signs = stored["scale"].sign()
    assert torch.equal(signs[:16], -signs[16:])
    assert (decode(weight, "kmeans-shared16-2") - weight).abs().max() < 0.01


# --- every label -----------------------------------------------------------------------------------------------------

WEIGHTS = {
    "gaussian": gaussian(6, 53),
    "zeros": torch.zeros(3, 20),
    "constant": torch.full((4, 30), 0.7),
    "one weight": torch.tensor([[-0.7]]),
    "two": torch.tensor([[0.3, -2.0], [0.0, 1e-4]]),
    "outlier": torch.nn.functional.pad(torch.tensor([[5.0], [-3.0]]), (9, 30)),
    "subnormal": torch.tensor([[1e-40, -1e-40, 0.0, 1.4e-45]] * 2),
    "huge": torch.finfo(torch.float32).max * torch.tensor([[1.0, -1.0, 0.0, 1.0]]),
    "half": gaussian(5, 40).half(),
    "embedding": gaussian(70, 8).bfloat16(),
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("label", LABELS)
def test_what_is_stored_is_what_is_counted_and_comes_back(label: str, weight: Tensor) -> None:
    for bits in (2, 4, 7):
        scheme = Scheme.parse(label.format(bits))
        assert scheme.label == label.format(bits)
        q = quantize_weight(weight, scheme)
        assert 0 <= 8 * q.nbytes - q.num_bits < 64
        assert q.tensors.keys() == stored_tensors(weight.shape, scheme).keys()
        again = QuantizedWeight.from_tensors(scheme, q.shape, None, q.dtype, q.tensors).dequantize()
        assert torch.equal(again, q.dequantize())
        assert again.isfinite().all()
        assert (again.double() - weight.double()).abs().max() <= 1.1 * weight.double().abs().max()


@pytest.mark.parametrize(
    "label", ["uniform-channel-{}-symmetric", "uniform-channel-{}-p2", "log2-group24-{}-halfsteps-p2"]
)
def test_error_falls_with_bits_for_the_options_of_a_grid(label: str) -> None:
    weight = student(12, 96, df=5)
    errors = [float((weight - decode(weight, label.format(bits))).square().mean()) for bits in (2, 3, 4)]
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]


def test_p2_has_the_least_squared_error() -> None:
    weight = student(40, 200, df=4)
    for label in ("uniform-channel-3", "log2-channel-3", "uniform-channel-3-symmetric"):
        squared, usual = ((weight - decode(weight, f"{label}{p}")).square().sum(dim=1) for p in ("-p2", ""))
        assert (squared <= usual * (1 + 1e-5)).all()


def test_half_steps_are_powers_of_the_root_of_two() -> None:
    weight = torch.tensor([[1.0, 0.5**0.5, -0.5, 0.125**0.5, 0.25, -(0.5**0.5), 0.0]])
    assert torch.allclose(decode(weight, "log2-channel-4-halfsteps"), weight, rtol=2**-10)


def test_symmetric_grids_reach_further_on_the_side_of_the_largest_weight() -> None:
    weight = torch.stack([torch.arange(-8.0, 8.0), -torch.arange(-8.0, 8.0)])
    assert torch.equal(decode(weight, "uniform-channel-4-symmetric"), weight)


def test_calibrated_results_do_not_depend_on_the_number_of_threads() -> None:
    weight, moments, threads = student(64, 600, df=4), correlated(600), torch.get_num_threads()
    schemes = [Scheme.parse(f"{x}-3-importance") for x in ("kmeans-channel", "kmeans-shared64", "uniform-tensor")]
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append([q.dequantize() for q in quantize_options(weight, schemes, moments=moments)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("calibration", ["importance", "feedback"])
def test_a_split_weight_takes_the_moments_of_its_halves(calibration: str) -> None:
    weight, moments = torch.cat([gaussian(8, 6, 3, 3), 9 * gaussian(8, 4, 3, 3, seed=1)], dim=1), correlated(90)
    halves = [
        calibrated(weight[:, :6], f"kmeans-channel-3-{calibration}", moments.part(slice(0, 54))),
        calibrated(weight[:, 6:], f"kmeans-channel-3-{calibration}", moments.part(slice(54, 90))),
    ]
    decoded = calibrated(weight, f"kmeans-channel-3-{calibration}", moments, split=6)
    assert torch.equal(decoded, torch.cat(halves, dim=1))


def test_options_share_their_moments() -> None:
    weight, moments = gaussian(8, 40), correlated(40)
    schemes = [Scheme.parse(label.format(b) + c) for label in LABELS for b in (2, 3) for c in ("", "-feedback")]
    for scheme, q in zip(schemes, quantize_options(weight, schemes, moments=moments), strict=True):
        assert torch.equal(q.dequantize(), quantize_weight(weight, scheme, moments=moments).dequantize())


# --- bad input -------------------------------------------------------------------------------------------------------


def test_calibration_that_does_not_fit_is_one_clear_error() -> None:
    weight, scheme = gaussian(6, 10), Scheme.parse("kmeans-channel-3-feedback")
    with pytest.raises(QuantDMError, match=r"blocks\.0: got kmeans-channel-3-feedback without moments"):
        quantize_weight(weight, scheme, name="blocks.0")
    for second in (torch.eye(9)[None], torch.eye(10), torch.eye(10).expand(4, 10, 10)):
        with pytest.raises(QuantDMError, match=r"layer: got moments .* expected \(conv groups, 10, 10\)"):
            quantize_weight(weight, scheme, name="layer", moments=Moments(second, 5))
    with pytest.raises(QuantDMError, match="NaN or infinite moments"):
        quantize_weight(weight, scheme, moments=Moments(torch.full((1, 10, 10), math.nan), 5))
    indefinite = torch.eye(10)[None] - 20 * torch.ones(1, 10, 10) * (1 - torch.eye(10))
    with pytest.raises(QuantDMError, match="not positive"):
        quantize_weight(weight, scheme, moments=Moments(indefinite * 100, 5))


@pytest.mark.parametrize(
    "label",
    [
        "uniform-shared64-4", "kmeans-channel-4-symmetric", "uniform-channel-4-halfsteps", "kmeans-shared64-4-int8",
        "kmeans-channel-4-p2", "uniform-channel-4-p2-importance", "uniform-channel-4-feedback-symmetric",
        "kmeans-shared1-4", "kmeans-channel-4-gptq",
    ],
)  # fmt: skip
def test_labels_that_make_no_sense_are_refused(label: str) -> None:
    with pytest.raises(QuantDMError, match="scheme"):
        Scheme.parse(label)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants an accelerator")
def test_a_weight_on_an_accelerator_is_fitted_as_on_the_processor_bit_by_bit() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, x = torch.randn(24, 40, generator=generator), torch.randn(200, 40, generator=generator)
    moments, schemes = Moments((x.T @ x)[None] / 200, 200), [Scheme.parse("kmeans-channel-3-feedback")]
    here = quantize_options(weight, schemes, moments=moments)[0]
    there = quantize_options(weight.cuda(), schemes, moments=moments.to(torch.device("cuda")))[0]
    assert all(tensor.is_cuda for tensor in there.tensors.values())
    assert all(torch.equal(tensor.cpu(), here.tensors[name]) for name, tensor in there.tensors.items())
