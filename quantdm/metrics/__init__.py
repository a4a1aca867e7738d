"""Features -> statistics -> distance."""

from quantdm.metrics.classifier import DigitClassifier, load_digit_classifier
from quantdm.metrics.distance import frechet_distance, psnr, relative_error
from quantdm.metrics.features import batched, load_extractor

__all__ = [
    "DigitClassifier",
    "batched",
    "frechet_distance",
    "load_digit_classifier",
    "load_extractor",
    "psnr",
    "relative_error",
]
