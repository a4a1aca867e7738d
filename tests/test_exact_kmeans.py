"""Exact k-means, and how near the usual one comes to it at every bit-width."""

import pytest
import torch
from torch import Tensor

from quantdm.quantizers import quantize_weight
from quantdm.quantizers.kmeans import encode, fit_codebook
from quantdm.quantizers.sorted_rows import SortedRows, sort_rows
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
