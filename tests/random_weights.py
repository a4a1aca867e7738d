"""Weights to quantize in tests, and the short way to and fro."""

import numpy as np
import torch
from torch import Tensor

from quantdm.quantizers import quantize_weight
from quantdm.schemes import Scheme

METHODS = ("uniform", "kmeans", "log2")
KINDS = ("tensor", "channel", "group24")


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student(*shape: int, df: float, seed: int = 0) -> Tensor:
    uniform = torch.from_numpy(np.random.default_rng(seed).standard_t(df, shape))
    return uniform.float()


def decode(weight: Tensor, label: str, split: int | None = None) -> Tensor:
    return quantize_weight(weight, Scheme.parse(label), split=split).dequantize()
