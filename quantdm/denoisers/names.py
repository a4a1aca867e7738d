"""What module paths say: operation types, stages of U-Nets, repeated structure."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

_STAGE = re.compile(r"(?:^|\.)(down|mid|up)_?blocks?(?:\.|$)")


def op_type_of(layer: str, below: Mapping[str, int]) -> str:
    """Return the operation type: the path after the last repeated element ("attn1.to_q", "resnets.conv1").

    Args:
        layer: dotted path.
        below: number of weight layers below every module path; a numbered element with several is repeated structure.
    """
    parts = layer.split(".")
    cut = max((k for k, p in enumerate(parts) if p.isdigit() and below[".".join(parts[: k + 1])] > 1), default=-1)
    rest = parts[cut + 1 :]
    alone = sum(not p.isdigit() for p in rest) == 1  # "conv1" says too little: keep the list's name before it
    return ".".join([parts[cut - 1], *rest] if alone and cut > 0 else rest)


def stage_of(path: str) -> str:
    """Return "down", "mid" or "up" for a path inside such a block of a U-Net, else ""."""
    match = _STAGE.search(path)
    return match.group(1) if match else ""


def weights_below(names: Iterable[str]) -> Counter[str]:
    """Count the weight layers below (or at) every module path."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        counts.update(".".join(parts[:k]) for k in range(len(parts) + 1))
    return counts
