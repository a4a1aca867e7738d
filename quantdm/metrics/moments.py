"""Sums of features that merge exactly: n, sum x, sum x x^T in float64; their mean and covariance."""

from dataclasses import dataclass, replace

import torch

from quantdm.errors import QuantDMError

CHUNK = 1024  # rows that become float64 at a time


@dataclass(frozen=True)
class Moments:
    """The first two moments of a set of features, as sums.

    `ruler` says which features of what resizing they are of (see `FeatureSpace.ruler`): sums of different rulers are
    never added or compared. `source` says what they were computed from.
    """

    n: int
    total: torch.Tensor  # [F] float64
    outer: torch.Tensor  # [F, F] float64
    ruler: str = ""
    source: str = ""

    @classmethod
    def of(cls, features: torch.Tensor, *, ruler: str = "", source: str = "") -> "Moments":
        """Sum features [N, F] in float64, a chunk of rows at a time.

        Raises:
            QuantDMError: a feature is NaN or infinite.
        """
        width = features.shape[1]
        total, outer = torch.zeros(width).double(), torch.zeros(width, width).double()
        for start in range(0, len(features), CHUNK):
            x = features[start : start + CHUNK].double()
            total += x.sum(0)
            outer.addmm_(x.T, x)
        if not outer.isfinite().all():
            raise QuantDMError(f"features{' of ' + source if source else ''}: NaN or infinite, expected numbers")
        return cls(len(features), total, outer, ruler, source)

    def __add__(self, other: "Moments") -> "Moments":
        """Return the moments of both sets together.

        Raises:
            QuantDMError: they are of different features or resizes.
        """
        check_same_ruler(self, other)
        source = " + ".join(dict.fromkeys(s for s in (self.source, other.source) if s))
        return replace(
            self, n=self.n + other.n, total=self.total + other.total, outer=self.outer + other.outer, source=source
        )

    @property
    def mean(self) -> torch.Tensor:
        """The mean [F]."""
        return self.total / self.n

    @property
    def covariance(self) -> torch.Tensor:
        """The unbiased covariance [F, F].

        Raises:
            QuantDMError: fewer than two images.
        """
        if self.n < 2:
            raise QuantDMError(
                f"{self.source or 'features'}: got {self.n} images, expected at least 2: one has no covariance"
            )
        return (self.outer - torch.outer(self.total, self.total) / self.n) / (self.n - 1)


def check_same_ruler(a: Moments, b: Moments) -> None:
    """Check that two sets of statistics are of the same features and the same resizing.

    Raises:
        QuantDMError: names both sources and both rulers.
    """
    if a.ruler != b.ruler and a.ruler and b.ruler:
        raise QuantDMError(
            f"{b.source or 'statistics'}: are of {b.ruler}, but {a.source or 'the others'} of {a.ruler}; expected one "
            "extractor and one resizing: compute them again with the same --features"
        )
    if len(a.total) != len(b.total):
        raise QuantDMError(
            f"{b.source or 'statistics'}: have {len(b.total)} features, but {a.source or 'the others'} "
            f"{len(a.total)}; expected statistics of one extractor"
        )
