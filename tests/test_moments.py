"""Statistics and distances of features: closed forms, independent float64 implementations, merging, known networks."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from quantdm.errors import QuantDMError
from quantdm.metrics.distance import frechet_distance, frechet_of_moments
from quantdm.metrics.intervals import bootstrap_interval, draws_interval, frechet_infinity
from quantdm.metrics.kernels import cmmd, cubic_kernel, gaussian_kernel, kid, squared_mmd
from quantdm.metrics.moments import Moments
from quantdm.metrics.neighbours import neighbour_figures
from quantdm.metrics.one_by_one import inception_score


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(mean, cov, n=2000, seed=0):
    """Samples with exactly this mean and covariance, and, being symmetric, with the third moments of the Gaussian."""
    x = torch.randn(n // 2, len(mean), generator=rng(seed), dtype=torch.float64)
    x = torch.cat([x, -x])
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x @ torch.linalg.cholesky(torch.tensor(cov, dtype=x.dtype)).T + torch.tensor(mean, dtype=x.dtype)


A = gaussian([0.0, 1.0], [[1.0, 0.3], [0.3, 2.0]])
B = gaussian([0.5, 0.0], [[2.0, -0.4], [-0.4, 1.0]], seed=1)


def in_four(x):
    """The moments of a set that four processes summed, of uneven shares."""
    parts = [Moments.of(part) for part in x.split([100, 700, 3, len(x) - 803])]
    return (parts[3] + parts[1]) + (parts[0] + parts[2])


@pytest.mark.parametrize("moments", [Moments.of, in_four], ids=["one process", "merged from four"])
def test_frechet_distance_of_sums_is_that_of_gaussians_and_of_scipy(moments):
    a, b = moments(A), moments(B)
    cov_a, cov_b = np.array([[1.0, 0.3], [0.3, 2.0]]), np.array([[2.0, -0.4], [-0.4, 1.0]])
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    closed = 0.25 + 1 + np.trace(cov_a + cov_b - 2 * root).real
    assert frechet_of_moments(a, b) == pytest.approx(closed, abs=1e-9)
    x, y = (torch.randn(3000, 48, generator=rng(s)).double() @ torch.randn(48, 48, generator=rng(9)).double()
            for s in (1, 2))  # fmt: skip
    mine = frechet_of_moments(moments(x.float()), moments(y.float()))
    cx, cy = (np.cov(z.float().double().numpy().T) for z in (x, y))
    gap = (x.float().double().mean(0) - y.float().double().mean(0)).square().sum().item()
    independent = gap + np.trace(cx + cy - 2 * scipy.linalg.sqrtm(cx @ cy).real)
    assert mine == pytest.approx(independent, rel=1e-6)
    assert mine == pytest.approx(frechet_distance(x.float(), y.float()), rel=1e-9)


def test_merged_sums_are_those_of_the_whole_in_any_order():
    whole = Moments.of(A)
    for order in itertools.permutations(A.split(500)):
        first, *others = (Moments.of(part) for part in order)
        for each in others:
            first = first + each
        torch.testing.assert_close(first.outer, whole.outer, rtol=1e-13, atol=1e-10)
        assert first.n == whole.n


def test_statistics_of_another_extractor_are_refused_by_name():
    a, b = Moments.of(A, ruler="FID (clean-fid)", source="x"), Moments.of(B, ruler="FID (pytorch-fid)", source="y")
    for both in (lambda: a + b, lambda: frechet_of_moments(a, b)):
        with pytest.raises(QuantDMError, match=r"y: are of FID \(pytorch-fid\), but x of FID \(clean-fid\)"):
            both()
    with pytest.raises(QuantDMError, match="have 3 features, but the others 2"):
        frechet_of_moments(Moments.of(A), Moments.of(torch.zeros(4, 3)))
    with pytest.raises(QuantDMError, match="got 1 images"):
        frechet_of_moments(Moments.of(A[:1]), Moments.of(B))


def test_cubic_kernel_distance_has_its_closed_form_on_gaussians():
    def mean_kernel(m1, c1, m2, c2):
        # E (x.y/F + 1)^3 from the first three raw moments, by Isserlis' theorem
        def raw(m, c):
            second = np.einsum("i,j->ij", m, m) + c
            third = np.einsum("i,j,k->ijk", m, m, m)
            for pattern in ("i,jk->ijk", "j,ik->ijk", "k,ij->ijk"):
                third = third + np.einsum(pattern, m, c)
            return m, second, third

        terms = [np.sum(p * q) for p, q in zip(raw(m1, c1), raw(m2, c2), strict=True)]
        return 1 + 3 * terms[0] / 2 + 3 * terms[1] / 4 + terms[2] / 8

    a = np.array([0.0, 1.0]), np.array([[1.0, 0.3], [0.3, 2.0]])
    b = np.array([0.5, 0.0]), np.array([[2.0, -0.4], [-0.4, 1.0]])
    # np.cov divides by n - 1: the moments of the samples themselves are by n
    share = (len(A) - 1) / len(A)
    a, b = (a[0], a[1] * share), (b[0], b[1] * share)
    closed = mean_kernel(*a, *a) + mean_kernel(*b, *b) - 2 * mean_kernel(*a, *b)
    assert squared_mmd(A, B, cubic_kernel, unbiased=False) == pytest.approx(closed, abs=1e-9)


def test_gaussian_kernel_distance_has_its_closed_form():
    # quantiles of two normals, standardised: for a kernel this wide their moments are all that counts
    q = torch.special.ndtri((torch.arange(4000).double() + 0.5) / 4000)
    q = (q / q.square().mean().sqrt())[:, None]
    x, y, sigma = 1 + 2 * q, 0.5 * q, 30.0

    def mean_kernel(gap, variance):  # E exp(-(x-y)^2 / 2 s^2) with x - y normal
        return sigma / math.sqrt(sigma**2 + variance) * math.exp(-(gap**2) / (2 * (sigma**2 + variance)))

    closed = mean_kernel(0, 8) + mean_kernel(0, 0.5) - 2 * mean_kernel(1, 4.25)
    assert squared_mmd(x, y, gaussian_kernel(sigma), unbiased=False) == pytest.approx(closed, abs=1e-6)


def test_kernel_distances_equal_an_independent_implementation():
    x, y = (torch.randn(300, 20, generator=rng(s)).double() * (1 + s / 5) for s in (1, 2))
    k = ((torch.cat([x, y]) @ torch.cat([x, y]).T) / 20 + 1) ** 3
    kxx, kyy, kxy = k[:300, :300], k[300:, 300:], k[:300, 300:]
    n = 300
    independent = (kxx.sum() - kxx.trace() + kyy.sum() - kyy.trace()) / (n * (n - 1)) - 2 * kxy.mean()
    assert kid(x.float(), y.float())[0] == pytest.approx(independent.item(), abs=1e-6)
    assert kid(x, y)[0] == pytest.approx(poly_mmd(x, y, degree=3, gamma=None, coef=1).item(), abs=1e-9)
    merged = torch.cat([x[150:], x[:150]])  # what other processes made comes in another order
    assert kid(merged, y)[0] == pytest.approx(independent.item(), abs=1e-9)
    u, v = (z / z.norm(dim=1, keepdim=True) for z in (x, y))
    mean = [torch.exp(-((p[:, None] - q[None]) ** 2).sum(-1) / 200).mean() for p, q in ((u, u), (v, v), (u, v))]
    assert cmmd(x, y) == pytest.approx(1000 * (mean[0] + mean[1] - 2 * mean[2]).item(), abs=1e-6)
    subsets, error = kid(x, y, subsets=50, size=100)
    assert abs(subsets - independent.item()) < 4 * error + 1e-3


def test_unbiased_kid_of_few_images_is_around_zero_where_frechet_is_not():
    draws = [torch.randn(60, 32, generator=rng(s)) for s in range(40)]
    pairs = list(zip(draws[::2], draws[1::2], strict=True))
    kids = torch.tensor([kid(a, b)[0] for a, b in pairs])
    assert abs(kids.mean()) < 3 * kids.std() / len(kids) ** 0.5
    assert min(frechet_distance(a, b) for a, b in pairs) > 5


def test_neighbour_figures_know_equal_far_and_collapsed_sets():
    real = torch.randn(300, 4, generator=rng())
    same = neighbour_figures(real, real)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    assert neighbour_figures(real + 100, real) == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    collapsed = neighbour_figures(real[:1] + 1e-3 * torch.randn(300, 4, generator=rng(1)), real)
    assert collapsed["precision"] == 1
    assert collapsed["recall"] < 0.05
    assert collapsed["coverage"] < 0.05
    with pytest.raises(QuantDMError, match="got 5, expected more than 5"):
        neighbour_figures(real[:5], real)


def test_extrapolation_takes_the_bias_away():
    a, b = (torch.randn(1200, 64, generator=rng(s)) for s in (1, 2))
    wide = Moments(10**9, torch.zeros(64).double(), torch.eye(64).double() * (10**9 - 1))  # the truth: N(0, 1)
    value, error = frechet_infinity(a, wide)
    plain = frechet_of_moments(Moments.of(a), wide)
    assert plain > 0.7
    assert abs(value) < 0.15 * plain
    assert error < 0.05
    with pytest.raises(QuantDMError, match="got 10, expected 18 or more"):
        frechet_infinity(b[:10], wide)


def test_inception_score_equals_an_independent_implementation():
    p = scipy.special.softmax(3 * torch.randn(200, 10, generator=rng()).double().numpy(), axis=1)
    independent = math.exp(np.mean([scipy.stats.entropy(row, p.mean(0)) for row in p]))
    assert inception_score(torch.from_numpy(np.log(p))) == pytest.approx(independent, rel=1e-9)
    assert inception_score(50 * torch.eye(10)) == pytest.approx(10, rel=1e-6)


def test_sums_are_those_of_torchmetrics():
    class Features(torch.nn.Module):
        num_features = 6

        def forward(self, x):
            return x

    x, y = (torch.randn(400, 6, generator=rng(s)) * 2 + 1 for s in (3, 4))
    metric = FrechetInceptionDistance(feature=Features())
    metric.set_dtype(torch.float64)
    metric.update(x, real=True)
    metric.update(y, real=False)
    torch.testing.assert_close(Moments.of(x).outer, metric.real_features_cov_sum)
    expected = metric.compute().item()
    assert frechet_of_moments(Moments.of(x), Moments.of(y)) == pytest.approx(expected, rel=1e-4)


# ----------------------------------------------------------------------------------------------------------- intervals


def test_bootstrap_of_a_paired_difference_covers_it():
    """A small simulation (the large one: eval/bench_metrics.py): skewed values, what both rows share cancels."""
    hits, widths, truth = 0, [], 0.3
    for seed in range(100):
        g = rng(seed)
        shared = 5 * torch.randn(2, 40, generator=g)
        ours = shared + torch.empty(2, 40).exponential_(generator=g) - 1 + truth
        found = bootstrap_interval(
            lambda index, a=ours, b=shared: float(sum((a[d] - b[d])[i].mean() for d, i in enumerate(index)) / 2),
            [40, 40], resamples=200, seed=seed,
        )  # fmt: skip
        hits += found.low <= truth <= found.high
        widths.append(found.high - found.low)
    assert 88 <= hits <= 99
    assert max(widths) < 1  # unpaired it would be 4.4


def test_draws_give_a_t_interval_and_one_draw_none():
    found = draws_interval([1.0, 2.0, 3.0])
    assert (found.estimate, found.over) == (2.0, "3 draws")
    assert found.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert not found.clear
    with pytest.raises(QuantDMError, match="one draw has no spread"):
        draws_interval([1.0])
    with pytest.raises(QuantDMError, match="expected 2 images in each draw and 20 resamples"):
        bootstrap_interval(lambda index: 0.0, [1, 5])
