"""Exact k-means, and how near the usual one comes to it at every bit-width."""

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from quantdm.quantizers import quantize_weight
from quantdm.quantizers.grid import _Sums
from quantdm.quantizers.kmeans import encode, fit_codebook
from quantdm.quantizers.sorted_rows import SortedRows, sort_rows
from quantdm.quantizers.tables import round_codebook
from quantdm.schemes import Scheme
from tests.random_weights import gaussian, student
from tests.test_quantizers import optimal_error


def error_of(rows: Tensor, codebook: Tensor, importance: Tensor | None = None) -> Tensor:
    difference = (rows - codebook.gather(1, encode(rows, codebook).long())).double().square()
    return (difference if importance is None else difference * importance).sum(dim=1)


ROWS = {
    "gaussian": gaussian(6, 300),
    "student-t(4)": student(6, 257, df=4),
    "student-t(1)": student(6, 200, df=1),
    "lattice": student(6, 220, df=3).mul(2).round(),
    "far from zero": gaussian(4, 90).mul(1e-3).add(5),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_exact_is_the_optimum_to_a_millionth(rows: Tensor, bits: int) -> None:
    codebook, counts = fit_codebook(sort_rows(rows), bits, exact=True)
    optimum = torch.tensor([optimal_error(row, 2**bits) for row in rows])
    rounding = rows.abs().amax(dim=1).mul(2.0**-24).square() * rows.shape[1]  # of the entries to float32
    assert (error_of(rows, codebook) <= optimum * (1 + 1e-6) + rounding).all()
    assert (counts.sum(dim=1) == rows.shape[1]).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_exact_with_importance_is_the_optimum_of_repeated_weights(bits: int) -> None:
    rows, repeats = student(5, 80, df=4), torch.randint(1, 5, (5, 80), generator=torch.Generator().manual_seed(0))
    codebook, _ = fit_codebook(sort_rows(rows, repeats.float()), bits, exact=True)
    for i in range(len(rows)):
        optimum = optimal_error(rows[i].repeat_interleave(repeats[i]), 2**bits)
        assert error_of(rows[i, None], codebook[i, None], repeats[i])[0] == pytest.approx(optimum, rel=1e-6)


def test_exact_passes_through_quantize_weight() -> None:
    weight = student(40, 300, df=4)
    scheme = Scheme.parse("kmeans-channel-4-fp16")
    usual, exact = (
        (weight - quantize_weight(weight, scheme, exact=flag).dequantize()).double().square().sum()
        for flag in (False, True)
    )
    assert exact < usual
    assert exact >= 0.98 * usual


@pytest.mark.parametrize(("bits", "most"), [(2, 1.01), (3, 1.01), (4, 1.01), (5, 1.02), (6, 1.05), (7, 1.05)])
def test_the_usual_codebook_is_near_the_optimum_at_every_width(bits: int, most: float) -> None:
    for rows in (gaussian(6, 640), student(6, 640, df=4)):
        ordered = sort_rows(rows)
        usual, exact = (error_of(rows, fit_codebook(ordered, bits, exact=flag)[0]) for flag in (False, True))
        assert (usual >= exact * (1 - 1e-6)).all()
        assert (usual / exact).mean() <= most


def test_one_row_of_few_distinct_weights_gets_the_optimum_unasked() -> None:
    weight = student(50, 400, df=4).bfloat16().float().mul(64).round()
    ordered = sort_rows(weight.view(1, -1))
    assert isinstance(ordered, SortedRows)
    assert ordered.counts is not None
    codebook, _ = fit_codebook(ordered, 4)
    optimum = optimal_error(weight.flatten(), 16)
    assert error_of(weight.view(1, -1), codebook)[0] == pytest.approx(optimum, rel=1e-6)


def with_outliers(count: int) -> Tensor:
    """Return rows of 600 weights of spread .02 and 40 of spread 1."""
    generator = torch.Generator().manual_seed(0)
    return torch.cat(
        [torch.randn(count, 600, generator=generator) * 0.02, torch.randn(count, 40, generator=generator)], 1
    )


@pytest.mark.parametrize(
    ("label", "worst"),
    [("kmeans-channel-2", 1.03), ("kmeans-channel-3", 1.08)]
    + [(f"kmeans-channel-{bits}-fp16", 1.03) for bits in (2, 3, 4)],
)
def test_rows_of_outliers_are_near_the_optimum_as_they_are_stored(label: str, worst: float) -> None:
    """On average an int8 table holds them up to 3 bits; the worst row of it needs fp16 there."""
    rows, scheme = with_outliers(96), Scheme.parse(label)
    optimum = error_of(rows, fit_codebook(sort_rows(rows), scheme.bits, exact=True)[0])
    share = (rows - quantize_weight(rows, scheme).dequantize()).double().square().sum(dim=1) / optimum
    assert share.mean() <= 1.01
    assert share.max() <= worst


def test_the_multiples_of_an_int8_table_are_chosen_as_the_best_there_are() -> None:
    """At 4 bits none is at the optimum; they are better than the rounded optimum, and the best by brute force."""
    rows = with_outliers(24)
    ordered, stored = sort_rows(rows), quantize_weight(rows, Scheme.parse("kmeans-channel-4")).dequantize()
    codebook, counts = fit_codebook(ordered, 4, exact=True)
    optimum = error_of(rows, codebook)
    table, scale = round_codebook(codebook, counts)
    rounded = error_of(rows, table.float() * scale.float()[:, None])
    share = (rows - stored).double().square().sum(dim=1) / optimum
    assert (share <= rounded / optimum + 1e-6).all()
    assert share.mean() <= 1.04
    assert share.max() <= 1.12
    few = torch.tensor([[-1.0, -0.02, 0.0, 0.01, 0.02, 0.05, 1.1]])
    sums = _Sums(few[0].double().numpy(), np.arange(8.0))
    levels, error = sums.best(0.1, 3)
    brute = min(sums.error(np.array(chosen) * 0.1) for chosen in combinations(range(-10, 12), 3))
    assert error == pytest.approx(brute, rel=1e-9)
    assert sums.error(levels * 0.1) == pytest.approx(error, rel=1e-9)
