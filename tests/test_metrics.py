"""Distances: closed forms, and agreement with an independent implementation."""

import math

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from quantdm.errors import QuantDMError
from quantdm.metrics import (
    batched,
    frechet_distance,
    load_digit_classifier,
    load_extractor,
    psnr,
    relative_error,
)
from quantdm.pipelines.embedded.digits import load_digit_images


def with_moments(mean, std, n=4000, seed=0):
    """Samples whose empirical mean and (diagonal) covariance are exactly the given ones."""
    x = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x * torch.tensor(std) + torch.tensor(mean)


def test_frechet_distance_of_gaussians_has_its_closed_form():
    a = with_moments([0.0, 1.0, 2.0], [1.0, 2.0, 0.5])
    b = with_moments([1.0, 1.0, 0.0], [3.0, 2.0, 1.0], seed=1)
    expected = (1 + 0 + 4) + ((1 - 3) ** 2 + 0 + 0.5**2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_zero_on_itself_and_symmetric():
    a, b = torch.randn(200, 8), torch.randn(300, 8) * 2
    assert frechet_distance(a, a) < 1e-9
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_frechet_distance_survives_a_singular_covariance():
    a = torch.randn(10, 1).expand(-1, 5).clone()
    assert math.isfinite(frechet_distance(a, torch.randn(50, 5)))


def test_frechet_distance_equals_torchmetrics():
    class Features(torch.nn.Module):
        num_features = 64

        def forward(self, images):
            return load_digit_classifier().features(images)

    train, test = load_digit_images("train")[0][:400], load_digit_images("test")[0][:400]
    metric = FrechetInceptionDistance(feature=Features(), normalize=True, input_img_size=(3, 32, 32))
    metric.set_dtype(torch.float64)
    metric.update(train, real=True)
    metric.update(test, real=False)
    extract = load_extractor("digits")
    assert frechet_distance(extract(train), extract(test)) == pytest.approx(metric.compute().item(), rel=1e-3)


def test_psnr_and_relative_error_have_their_closed_forms():
    image = torch.full((1, 3, 4, 4), 0.5)
    assert psnr(image + 0.1, image) == pytest.approx(20.0, abs=1e-4)
    assert psnr(image, image) == math.inf
    assert relative_error(image * 1.1, image) == pytest.approx(0.01, rel=1e-4)


def test_classifier_knows_the_test_digits_and_features_do_not_depend_on_the_batch():
    images, labels = load_digit_images("test")
    classifier = load_digit_classifier()
    assert (classifier(images).argmax(1) == labels).float().mean() >= 0.985
    extract = load_extractor("digits")
    assert extract(images[:3]).shape == (3, 64)
    torch.testing.assert_close(batched(extract, images[:30], 7), extract(images[:30]))


def test_an_unknown_extractor_is_one_clear_error(tmp_path):
    with pytest.raises(QuantDMError, match="expected one of digits, pyramid, efficientnet-lite0, inception-"):
        load_extractor("inception")
    with pytest.raises(QuantDMError, match=r"no weights for 'clip:.*huggingface-cli .*offline, there are: digits"):
        load_extractor(f"clip:{tmp_path}")
