"""The size that a search is asked for, in one unit, and whether its options reach it."""

from collections.abc import Sequence
from numbers import Real

from quantdm.denoisers.inventory import LayerRecord
from quantdm.errors import QuantDMError, check_kind
from quantdm.hub.size import ExportSize
from quantdm.pipelines.loading import DiffusionPipeline
from quantdm.quantizers import count_bits
from quantdm.quantizers.branches import fits_rank
from quantdm.schemes import Scheme


def check_one_target(
    target_bits: float | None, target_bytes: int | None, target_pipeline_bytes: int | None = None
) -> None:
    """Check that a size is asked for in one unit.

    Raises:
        QuantDMError: in none or in several.
    """
    targets = {
        "target_bits": target_bits, "target_bytes": target_bytes, "target_pipeline_bytes": target_pipeline_bytes
    }  # fmt: skip
    for name, target in targets.items():
        if target is not None:
            check_kind(target, Real, name, "give a number")
    if sum(target is not None for target in targets.values()) != 1:
        raise QuantDMError(
            "target: give exactly one of target_bits (--target-bits, per weight), target_bytes (--target-size, the "
            "denoiser on disk) and target_pipeline_bytes (--pipeline-size, all parts on disk)"
        )


def reachable_bits(layers: Sequence[LayerRecord], options: Sequence[Scheme]) -> tuple[float, float]:
    """Return the smallest and the largest average bits that the options allow."""
    table = [
        [count_bits(layer.shape, scheme, layer.split) for scheme in options if fits_rank(layer.shape, scheme)]
        for layer in layers
    ]
    weights = sum(layer.num_weights for layer in layers)
    return sum(map(min, table)) / weights, sum(map(max, table)) / weights


def checked_target(
    layers: Sequence[LayerRecord],
    options: Sequence[Scheme],
    pipe: DiffusionPipeline,
    *,
    target_bits: float | None,
    target_bytes: int | None,
    embeddings: Scheme | None = None,
) -> float:
    """Return the target as average bits per weight; `target_bytes` bounds the denoiser's files as an export has them.

    Raises:
        QuantDMError: none or both given, or out of reach; the reachable range is stated in the unit that was given.
    """
    check_one_target(target_bits, target_bytes)
    low, high = reachable_bits(layers, options)
    if target_bits is None:
        assert target_bytes is not None
        size = ExportSize(pipe, embeddings=embeddings)
        least, most = size.extremes(options)
        if not least <= target_bytes <= most:
            raise QuantDMError(
                f"target: got {target_bytes:,} bytes, but these options reach {least:,} to {most:,} bytes "
                f"({least / 1e6:,.2f} to {most / 1e6:,.2f} MB): the denoiser's files, everything counted"
            )
        return min(max(size.bits_within(options, target_bytes), low), high)
    if not low <= target_bits <= high:
        raise QuantDMError(
            f"target: got {target_bits} bits per weight, but these options reach {low:.4f} to {high:.4f}"
        )
    return float(target_bits)
