"""How numbers are worded."""

import math
from pathlib import Path
from typing import Any

# ------------------------------------------------------------------------------------------------------------ numbers


def plus_minus(row: dict[str, Any], figure: str = "fid_fp", digits: int | None = None) -> str:
    """Return "0.0453 ± 0.0031" (it does not break over lines): as many decimals as the spread deserves."""
    mean, sd = row[figure], row.get(f"{figure}_sd") or 0.0
    if digits is None:
        digits = decimals(sd if sd > 0 else abs(mean) / 100)
    return f"{mean:.{digits}f}\u00a0±\u00a0{sd:.{digits}f}" if sd > 0 else f"{mean:.{digits}f}"


def times(ratio: float) -> str:
    """Return a ratio as "2.8 times"."""
    return f"{ratio:.1f} times" if ratio < 10 else f"{ratio:,.0f} times"


def decimals(spread: float) -> int:
    """Return the decimals that show two digits of a spread (at most 5)."""
    return 4 if spread <= 0 else min(5, max(0, 1 - math.floor(math.log10(spread))))


def percent(share: float) -> str:
    """Return a share as per cent: two digits, none pretended."""
    value = 100 * share
    return f"{value:.0f}\u00a0%" if value >= 10 else f"{value:.1f}\u00a0%" if value >= 0.1 else f"{value:.2g}\u00a0%"


def guidance(scale: float | None) -> str:
    """Return a guidance scale in words; None: a protocol that leaves it to the pipeline."""
    return "as the pipeline has it" if scale is None else str(scale)


def megabytes(count: float) -> str:
    """Return bytes in the unit that fits (1 MB = 10^6 bytes)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f}\u00a0{unit}" if count < 100 * size else f"{count / size:.0f}\u00a0{unit}"
    return f"{count:.0f}\u00a0bytes"


def model_label(model: str) -> str:
    """Return a model's name without the directories of this machine."""
    return (Path(model).name if Path(model).is_absolute() else model) or "a pipeline built in memory"
