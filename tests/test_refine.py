"""Refinement of calibrated weights: refit and descent lower the exact objective, step by step, whatever H is."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantdm.quantizers import Moments, quantize_weight
from quantdm.quantizers.descent import descend
from quantdm.quantizers.feedback import factorize, feedback_codes
from quantdm.quantizers.kmeans import fit_codebook
from quantdm.quantizers.objective import OutputError
from quantdm.quantizers.refit import ScaleFit, Segments, TableFit, places, solve
from quantdm.quantizers.sorted_rows import sort_rows
from quantdm.schemes import Scheme
from tests.random_weights import gaussian, student

LABELS = [
    "kmeans-channel-2",
    "kmeans-channel-4",
    "kmeans-channel-3-fp16",
    "kmeans-tensor-3",
    "kmeans-group24-2",
    "kmeans-shared-3",
    "kmeans-shared24-3",
    "uniform-channel-3",
    "uniform-group24-2",
    "uniform-tensor-3",
    "uniform-channel-2-symmetric",
    "log2-channel-3",
]


def inputs(n: int, groups: int, *, vectors: int, decay: float, seed: int) -> Moments:
    """Moments of correlated inputs: `vectors` of them (fewer than n: singular), sizes spread over `decay` decades."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator) / n**0.5
    x = torch.randn(groups, vectors, n, generator=generator) * torch.logspace(0, -decay, n) @ mixing
    return Moments(x.mT @ x / vectors, vectors)


def objective(weight: Tensor, decoded: Tensor, moments: Moments) -> float:
    """Return the exact objective in float64."""
    G, n = moments.second.shape[:2]
    e = (weight - decoded).double().view(G, -1, n)
    return float((e @ moments.second.double() * e).sum())


def noise(weight: Tensor, decoded: Tensor, moments: Moments) -> float:
    """Return to what the objective is known in float32: where H is singular it is a small difference of large terms."""
    G, n = moments.second.shape[:2]
    e = (weight - decoded).double().abs().view(G, -1, n)
    return 2**-23 * float((e @ moments.second.double().abs() * e).sum())


@pytest.mark.parametrize("label", LABELS)
@settings(max_examples=4, deadline=None)
@given(
    groups=st.sampled_from([1, 3]),
    vectors=st.sampled_from([5, 40, 400]),
    decay=st.floats(0, 4),
    seed=st.integers(0, 2**20),
)
def test_every_stage_lowers_the_objective(label: str, groups: int, vectors: int, decay: float, seed: int) -> None:
    weight = student(12, 50, df=4, seed=seed)
    moments = inputs(50, groups, vectors=vectors, decay=decay, seed=seed)
    scheme, calibrated = Scheme.parse(label), Scheme.parse(f"{label}-feedback")
    weighted = Scheme.parse(f"{label}-importance")
    start = quantize_weight(weight, weighted, moments=moments).dequantize()
    rounded, rounding = objective(weight, start, moments), noise(weight, start, moments)
    stages = [
        objective(weight, quantize_weight(weight, calibrated, moments=moments, sweeps=n).dequantize(), moments)
        for n in (0, 1, 2, 6)
    ]
    for before, after in itertools.pairwise([rounded, *stages]):
        assert after <= before * (1 + 1e-5) + rounding
    assert scheme.bits == calibrated.bits


@pytest.mark.parametrize("label", LABELS)
def test_refinement_gains_what_feedback_leaves(label: str) -> None:
    weight, moments = gaussian(32, 96), inputs(96, 1, vectors=600, decay=1, seed=1)
    scheme = Scheme.parse(f"{label}-feedback")
    once, refined = (
        objective(weight, quantize_weight(weight, scheme, moments=moments, sweeps=n).dequantize(), moments)
        for n in (0, 4)
    )
    assert refined < 0.9 * once


def test_the_refit_of_a_table_is_the_least_squares_solution() -> None:
    # With codes fixed, c = (A^T H A)^-1 A^T H w for every row.
    weight = gaussian(6, 40).double()
    moments = inputs(40, 1, vectors=200, decay=1, seed=2)
    error = OutputError(weight, moments.second)
    codes = torch.randint(4, (6, 40), generator=torch.Generator().manual_seed(3))
    fit = TableFit(codes + torch.arange(6)[:, None] * 4, (6, 1, 4))
    found = solve(error, fit, torch.zeros(6, 1, 4, dtype=torch.float64), steps=12)
    H = moments.second[0].double()
    for row in range(6):
        A = torch.nn.functional.one_hot(codes[row], 4).double()
        exact = torch.linalg.solve(A.T @ H @ A, A.T @ H @ weight[row])
        assert torch.allclose(found[row, 0], exact, atol=1e-8)


def test_the_refit_of_scale_and_offset_is_the_least_squares_solution() -> None:
    weight = gaussian(5, 48).double()
    moments = inputs(48, 1, vectors=200, decay=1, seed=4)
    codes = torch.randint(8, (5, 48), generator=torch.Generator().manual_seed(5)).double()
    fit = ScaleFit((codes, torch.ones_like(codes)), Segments(5, 3, 16))
    found = solve(OutputError(weight, moments.second), fit, torch.zeros(5, 3, 2, dtype=torch.float64), steps=24)
    H = moments.second[0].double()
    for row in range(5):
        B = torch.zeros(48, 6, dtype=torch.float64)
        for group in range(3):
            columns = slice(16 * group, 16 * group + 16)
            B[columns, 2 * group], B[columns, 2 * group + 1] = codes[row, columns], 1
        exact = torch.linalg.solve(B.T @ H @ B, B.T @ H @ weight[row])
        assert torch.allclose(found[row].reshape(-1), exact, atol=1e-7)


def test_after_descent_has_ended_no_single_code_can_be_changed_for_the_better() -> None:
    weight = gaussian(4, 24)
    moments = inputs(24, 2, vectors=100, decay=1, seed=6)
    error = OutputError(weight, moments.second)
    table = torch.linspace(-2, 2, 4).expand(4, 1, 4)
    codes = torch.zeros(4, 24, dtype=torch.uint8)
    decoded = torch.full((4, 24), -2.0)
    for _ in range(30):
        ((decoded, codes),) = descend(error, [decoded], [codes], [table], 24)
    least = error.of_rows(decoded)
    for column, code in itertools.product(range(24), range(4)):
        other = decoded.clone()
        other[:, column] = table[0, 0, code]
        assert (error.of_rows(other) >= least - 1e-5).all()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("length", [40, 16])
def test_tables_that_go_through_the_columns_together_give_what_each_gives_alone(groups: int, length: int) -> None:
    weight, moments = student(12, 40, df=4), inputs(40, groups, vectors=200, decay=1, seed=3)
    blocks = -(-40 // length)
    lines = (12 if blocks > 1 else 1, 12, 12)  # a table of the whole tensor has no groups
    tables = [gaussian(lines[i], blocks, 4 * 2**i, seed=i).sort(dim=2, descending=i == 1).values for i in range(3)]
    factor = factorize(moments, "w")
    found = feedback_codes(weight, tables, length, factor)
    alone = [feedback_codes(weight, [table], length, factor)[0] for table in tables]
    assert all(map(torch.equal, found, alone))
    error = OutputError(weight, moments.second)
    decoded = [places(c, t, length).decode(t) for c, t in zip(found, tables, strict=True)]
    moved = descend(error, decoded, found, tables, length)
    for d, c, t, (values, codes) in zip(decoded, found, tables, moved, strict=True):
        ((own_values, own_codes),) = descend(error, [d], [c], [t], length)
        assert torch.equal(codes, own_codes)
        assert torch.equal(values, own_values)
        assert torch.equal(values, places(codes, t, length).decode(t))


def test_on_one_row_of_few_weights_descent_reaches_the_optimum_of_independent_inputs() -> None:
    weight = gaussian(3, 16)
    moments = Moments(torch.diag(torch.linspace(0.1, 2, 16))[None], 10)
    table = torch.tensor([-1.5, -0.4, 0.4, 1.5]).expand(3, 1, 4)
    codes = torch.zeros(3, 16, dtype=torch.uint8)
    start, error = torch.full_like(weight, -1.5), OutputError(weight, moments.second)
    ((decoded, found),) = descend(error, [start], [codes], [table], 16)
    assert torch.equal(found.long(), (weight[:, :, None] - table[0, 0]).abs().argmin(dim=2))
    assert torch.equal(decoded, table[0, 0][found.long()])


def test_with_uncorrelated_inputs_the_result_is_weighted_kmeans() -> None:
    # A diagonal H: every weight counts H_jj times. The optimum is that of exact weighted k-means.
    weight = student(16, 200, df=4)
    share = torch.linspace(-1, 1, 200).exp()
    moments, weights = Moments(torch.diag(share)[None], 10), share.expand(16, 200).contiguous()
    rows = sort_rows(weight, weights)
    exact = fit_codebook(rows, 3, exact=True)[0]
    least = float((weights * (weight[:, :, None] - exact[:, None]).square().amin(dim=2)).sum())
    found = quantize_weight(weight, Scheme.parse("kmeans-channel-3-fp16-feedback"), moments=moments).dequantize()
    assert least * (1 - 1e-4) <= objective(weight, found, moments) <= 1.02 * least


def test_columns_that_are_never_used_keep_their_codes() -> None:
    weight, moments = gaussian(8, 40), inputs(40, 1, vectors=200, decay=1, seed=7)
    second = moments.second.clone()
    second[:, 5:9], second[:, :, 5:9] = 0, 0
    scheme = Scheme.parse("uniform-channel-4-feedback")
    decoded = quantize_weight(weight, scheme, moments=Moments(second, 10)).dequantize()
    assert (decoded - weight)[:, 5:9].abs().max() < 1
