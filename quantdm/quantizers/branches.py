"""Branches: products of two thin factors that are added to what a quantized weight decodes to.

W_hat = Q + sum over k of s_k·a_k·b_k^T. Those of a low-rank scheme are int8 with one fp16 step s_k per pair, in units
of a power of two: sums of their products are exact in float64 in any order, so a weight decodes to the same bits on
every machine. Those of a fused LoRA are as exact as they were given.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from quantdm.errors import QuantDMError
from quantdm.quantizers.objective import Objective
from quantdm.schemes import Scheme

LOW_RANK, LORA = "branch", "lora"
TOP = 127.0  # the largest integer of a factor
LEAST_STEP = 2.0**-14  # the least normal fp16
POWER_ROUNDS = 6  # of the subspace iteration, each of which squares the ratio of two singular values
SPARE = 8  # directions beside the wanted ones, which make it converge sooner
PIECE = 2**22  # weights of a product at a time


def stored_branches(shape: Sequence[int], scheme: Scheme) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return name -> (shape, dtype) of the factors that are stored for a weight [C, ...] with n weights per row.

    Of a low-rank branch "branch_left" int8 [C, r], "branch_right" int8 [r, n], "branch_step" fp16 [r] and
    "branch_factor" fp32 [1]; of a LoRA "lora_left" [C, r] and "lora_right" [r, n] in fp16 or fp32, and "lora_step"
    fp32 [r].

    Raises:
        QuantDMError: a branch of a higher rank than the weight has.
    """
    check_rank(shape, scheme, "weight")
    lines, columns = shape[0], math.prod(shape[1:])
    stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if scheme.lowrank is not None:
        stored |= _factors(LOW_RANK, lines, scheme.lowrank, columns, torch.int8, torch.float16)
        stored["branch_factor"] = ((1,), torch.float32)
    if scheme.lora is not None:
        kind = torch.float32 if scheme.wide else torch.float16
        stored |= _factors(LORA, lines, scheme.lora, columns, kind, torch.float32)
    return stored


def fits_rank(shape: Sequence[int], scheme: Scheme) -> bool:
    """Tell whether a weight of this shape can have the low-rank branch of a scheme."""
    return (scheme.lowrank or 0) <= min(shape[0], math.prod(shape[1:]))


def check_rank(shape: Sequence[int], scheme: Scheme, name: str) -> None:
    """Check that a weight of this shape can have the low-rank branch of a scheme; `name` is that of its layer.

    Raises:
        QuantDMError: its rank is higher than the weight has.
    """
    if not fits_rank(shape, scheme):
        most = min(shape[0], math.prod(shape[1:]))
        raise QuantDMError(
            f"{name}: got {scheme} with a branch of rank {scheme.lowrank}, expected {most} at most for a weight "
            f"{tuple(shape)}; choose a smaller one, or a scheme without"
        )


def _factors(
    kind: str, lines: int, rank: int, columns: int, dtype: torch.dtype, step: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {
        f"{kind}_left": ((lines, rank), dtype),
        f"{kind}_right": ((rank, columns), dtype),
        f"{kind}_step": ((rank,), step),
    }


def factors_of(scheme: Scheme, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield left [C, r] and right [r, n] of every branch of a weight, float64; the steps are in the left one."""
    if scheme.lowrank is not None:
        step = tensors["branch_step"].double() * tensors["branch_factor"].double()
        yield tensors["branch_left"].double() * step, tensors["branch_right"].double()
    if scheme.lora is not None:
        yield tensors["lora_left"].double() * tensors["lora_step"].double(), tensors["lora_right"].double()


def add_branches(dense: Tensor, scheme: Scheme, tensors: Mapping[str, Tensor], rows: Tensor | None = None) -> Tensor:
    """Return a decoded weight, float32 [C, ...], with its branches added, in place where it is contiguous.

    Args:
        dense: of all rows of the weight, or of those whose numbers are `rows` (int64).
        scheme: of the weight.
        tensors: what is stored of it.
        rows: see `dense`.
    """
    dense = dense.contiguous()
    matrix = dense.flatten(1)
    for left, right in factors_of(scheme, tensors):
        left = left if rows is None else left[rows]
        step = max(PIECE // max(right.shape[1], 1), 1)
        for first in range(0, len(left), step):
            matrix[first : first + step] += (left[first : first + step] @ right).float()
    return dense


def fit_branch(residual: Tensor, error: Objective, rank: int, factor: float) -> dict[str, Tensor]:
    """Return the stored factors of the branch that takes most of a residual's error off (a closed form).

    With U the leading eigenvectors of R H R^T, U U^T R is the matrix L of that rank with the least tr (R-L) H (R-L)^T:
    the truncated SVD of R H^(1/2) times H^(-1/2), whatever the rank of H. The left factor is rounded first, the right
    one is its least squares partner.

    Args:
        residual: R, float32 [C, n].
        error: the objective whose H counts.
        rank: at most min(C, n).
        factor: a power of two in whose units R lies below 2^15.
    """
    scaled = residual / factor
    directions = _leading(scaled, error, rank).double()
    top = directions.abs().amax(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    left = (directions / top * TOP).round_()
    right = torch.linalg.pinv(left.T @ left, hermitian=True) @ (left.T @ scaled.double())
    step = (right.abs().amax(dim=1) / TOP).clamp_min(LEAST_STEP).half()
    right = (right / step.double()[:, None]).round_().clamp_(-TOP, TOP)
    return {
        "branch_left": left.to(torch.int8),
        "branch_right": right.to(torch.int8),
        "branch_step": step,
        "branch_factor": torch.tensor([factor], dtype=torch.float32, device=residual.device),
    }


def _leading(matrix: Tensor, error: Objective, rank: int) -> Tensor:
    """Return the leading `rank` eigenvectors of R H R^T, [C, rank], by subspace iteration from a fixed start.

    Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4.
    """
    lines = len(matrix)
    width = min(rank + SPARE, lines, matrix.shape[1])
    start = torch.randn(lines, width, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(start.to(matrix.device)).Q
    for _ in range(POWER_ROUNDS):
        basis = torch.linalg.qr(matrix @ error.weigh(basis.T @ matrix).T).Q
    seen = basis.T @ matrix
    turned = torch.linalg.eigh((error.weigh(seen) @ seen.T).double()).eigenvectors
    return (basis.double() @ turned).flip(1)[:, :rank]
