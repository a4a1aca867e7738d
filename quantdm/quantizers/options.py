"""Quantize a weight under one scheme or many: its coordinates, its branches, and what is left for the codes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantdm.errors import QuantDMError, check_kind
from quantdm.quantizers.branches import add_branches, check_rank, fit_branch
from quantdm.quantizers.fit import MatrixFit
from quantdm.quantizers.moments import Moments, check_moments
from quantdm.quantizers.objective import ColumnError, Objective, OutputError
from quantdm.quantizers.turning import Turning
from quantdm.quantizers.weight import QuantizedWeight, factor_of
from quantdm.schemes import Calibration, Scheme

SWEEPS = 4  # rounds of refit and descent after the feedback; most of the gain comes in the first two
ROUNDS = 2  # in which a branch is fitted again to what quantization leaves


def quantize_weight(
    weight: Tensor,
    scheme: Scheme,
    *,
    split: int | None = None,
    name: str = "weight",
    moments: Moments | None = None,
    exact: bool = False,
    sweeps: int = SWEEPS,
) -> QuantizedWeight:
    """Quantize one weight [C_out, C_in/groups, *kernel] of any float dtype.

    `split` is the input channel at which a long-skip concatenation is seamed; `name` appears in errors. `moments` are
    those of the layer's whole input; a calibrated scheme needs them, others ignore them. `exact` asks for the optimal
    codebooks of rows, at some ten times the time. `sweeps` rounds of refit and descent follow error feedback (0: none).

    Raises:
        QuantDMError: NaN or infinite weights, not a float tensor of two or more dimensions, `split` outside dim 1, a
            calibrated scheme without moments, moments of another layer, a branch of a higher rank than the weight has,
            or a scheme with a LoRA.
    """
    return quantize_options(weight, (scheme,), split=split, name=name, moments=moments, exact=exact, sweeps=sweeps)[0]


def quantize_options(
    weight: Tensor,
    schemes: Sequence[Scheme],
    *,
    split: int | None = None,
    name: str = "weight",
    moments: Moments | None = None,
    exact: bool = False,
    sweeps: int = SWEEPS,
) -> list[QuantizedWeight]:
    """Quantize one weight under every scheme, in their order.

    Bit-widths of one granularity share the sorted rows, schemes with feedback the factorized moments. Calibrated ones
    are fitted on the processor wherever the weight is: column after column is a chain of small operations, for which an
    accelerator takes many times as long; the result is on the weight's device.

    Raises:
        QuantDMError: as `quantize_weight`.
    """
    matrix = _check_weight(weight, split, name)
    _check_schemes(weight, schemes, moments, name)
    if moments is not None and weight.device.type != "cpu" and any(scheme.calibration for scheme in schemes):
        fitted = quantize_options(
            weight.cpu(), schemes, split=split, name=name, moments=moments.to(torch.device("cpu")), exact=exact,
            sweeps=sweeps,
        )  # fmt: skip
        return [each.to(weight.device) for each in fitted]
    found: dict[int, QuantizedWeight] = {}
    kinds = [(scheme.hadamard, scheme.equalised) for scheme in schemes]
    for kind in dict.fromkeys(kinds):
        same = [i for i in range(len(schemes)) if kinds[i] == kind]
        turning = Turning.of(matrix.view(weight.shape), schemes[same[0]], split, moments)
        fit = MatrixFit(tuple(weight.shape), split, turning.moments, name, exact, sweeps)
        layer = _Layer(matrix, weight, turning, fit, moments)
        for rank in dict.fromkeys(schemes[i].lowrank for i in same):
            own = [i for i in same if schemes[i].lowrank == rank]
            wanted = [schemes[i] for i in own]
            fitted = layer.quantized(matrix, wanted) if rank is None else layer.with_branches(wanted, rank)
            found |= zip(own, fitted, strict=True)
    return [found[i] for i in range(len(schemes))]


@dataclass(frozen=True, eq=False)
class _Layer:
    """One weight in one turning."""

    matrix: Tensor
    weight: Tensor
    turning: Turning
    fit: MatrixFit
    moments: Moments | None  # of the inputs as they are

    def quantized(self, matrix: Tensor, schemes: Sequence[Scheme]) -> list[QuantizedWeight]:
        """Return a matrix in the layer's own coordinates under schemes without branches."""
        turned = self.turning.turn(matrix.view(self.fit.shape)).reshape(matrix.shape)
        return self.fit(turned, schemes, self.weight.dtype, self.turning.stored)

    def with_branches(self, schemes: Sequence[Scheme], rank: int) -> list[QuantizedWeight]:
        """Return the weight under schemes with a low-rank branch of this rank.

        The branch starts as that of the weight itself and is fitted again to what quantization leaves (the alternation
        of LoftQ, arXiv 2310.08659); of all rounds the one with the least objective is kept.
        """
        factor = factor_of(self.matrix)
        best: dict[Scheme, tuple[float, QuantizedWeight]] = {}
        kinds: list[Calibration | None] = [scheme.calibration for scheme in schemes]
        for kind in dict.fromkeys(kinds):
            own, error = [scheme for scheme in schemes if scheme.calibration == kind], self._objective(kind)
            first = fit_branch(self.matrix, error, rank, factor)
            # every scheme of the first round quantizes the same matrix
            for scheme, tried in zip(own, self._beside(first, own), strict=True):
                best[scheme] = self._alternated(scheme, tried, error, factor)
        return [best[scheme][1] for scheme in schemes]

    def _alternated(
        self, scheme: Scheme, start: QuantizedWeight, error: Objective, factor: float
    ) -> tuple[float, QuantizedWeight]:
        """Return the best of a start and of the rounds after it, and its objective."""
        now, best = start, (self._error_of(start, error), start)
        for _ in range(ROUNDS):
            kept = replace(now, scheme=scheme.without_branches).dequantize(dtype=torch.float32).view(self.matrix.shape)
            branch = fit_branch(self.matrix - kept, error, scheme.lowrank or 0, factor)
            now = self._beside(branch, [scheme])[0]
            best = min(best, (self._error_of(now, error), now), key=lambda pair: pair[0])
        return best

    def _beside(self, branch: Mapping[str, Tensor], schemes: Sequence[Scheme]) -> list[QuantizedWeight]:
        """Return the weight under schemes that all have this branch."""
        rest = self.matrix - add_branches(torch.zeros_like(self.matrix), schemes[0], branch)
        found = self.quantized(rest, [scheme.without_branches for scheme in schemes])
        return [
            replace(each, scheme=scheme, tensors={**each.tensors, **branch})
            for each, scheme in zip(found, schemes, strict=True)
        ]

    def _objective(self, calibration: Calibration | None) -> Objective:
        moments = None if self.moments is None else self.moments.to(self.matrix.device)
        if calibration is None or moments is None:
            return ColumnError(self.matrix)
        if calibration == "importance":
            return ColumnError(self.matrix, moments.importance_of(len(moments.second)))
        return OutputError(self.matrix, moments.second)

    def _error_of(self, found: QuantizedWeight, error: Objective) -> float:
        return float(error.of_rows(found.dequantize(dtype=torch.float32).view(self.matrix.shape)).sum())


def _check_weight(weight: Tensor, split: int | None, name: str) -> Tensor:
    """Return the weight as a float32 matrix [C_out, n] after checking it."""
    if not weight.is_floating_point() or weight.dim() < 2 or weight.numel() == 0:
        got = f"{weight.dtype} {tuple(weight.shape)}"
        raise QuantDMError(f"{name}: got {got}, expected a float tensor [C_out, C_in, ...] that is not empty")
    if weight.is_meta:
        raise QuantDMError(f"{name}: got a tensor on the meta device, expected one with values; load the weights first")
    if split is not None and not 0 < split < weight.shape[1]:
        raise QuantDMError(f"{name}: got split={split}, expected an input channel between 1 and {weight.shape[1] - 1}")
    matrix = weight.detach().to(torch.float32).reshape(weight.shape[0], -1)
    bad = int((~torch.isfinite(matrix)).sum())
    if bad:
        raise QuantDMError(f"{name}: got {bad} NaN or infinite weights of {weight.numel()}, expected finite ones")
    return matrix


def _check_schemes(weight: Tensor, schemes: Sequence[Scheme], moments: Moments | None, name: str) -> None:
    """Check that a weight can be quantized under these schemes with these moments."""
    for scheme in schemes:
        check_kind(scheme, Scheme, "scheme", "give quantdm.Scheme.parse(label)")
    calibrated = [scheme for scheme in schemes if scheme.calibration is not None]
    if calibrated and moments is None:
        raise QuantDMError(
            f"{name}: got {calibrated[0]} without moments, expected those of the layer's inputs; calibrate"
        )
    if calibrated and moments is not None:
        check_moments(moments, weight.shape, name)
    if any(scheme.method == "original" for scheme in schemes):
        raise QuantDMError(f"{name}: got original, which is no scheme: leave the layer out of what is quantized")
    fused = [scheme for scheme in schemes if scheme.lora is not None]
    if fused:
        raise QuantDMError(
            f"{name}: got {fused[0]}, but a LoRA is fused into a layer that is quantized (quantdm.fuse_lora), no "
            "weight is quantized to it; drop -lora"
        )
    for scheme in schemes:
        check_rank(weight.shape, scheme, name)
