"""What the module tree says about weights: every Linear and Conv layer with its kind and shape."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

WeightKind = Literal["linear", "conv1d", "conv2d", "conv3d"]
WEIGHT_KINDS: tuple[tuple[type[nn.Module], WeightKind], ...] = (
    (nn.Linear, "linear"),
    (nn.Conv1d, "conv1d"),
    (nn.Conv2d, "conv2d"),
    (nn.Conv3d, "conv3d"),
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class WeightSpec:
    """What the module tree says about one Linear or Conv: kind and shape [C_out, C_in/groups, *kernel]."""

    name: str
    kind: WeightKind
    shape: tuple[int, ...]


def weight_specs(model: nn.Module) -> tuple[WeightSpec, ...]:
    """Return every Linear and Conv1d/2d/3d of a module, in `named_modules()` order."""
    found = []
    for name, module in model.named_modules():
        kind = next((k for cls, k in WEIGHT_KINDS if isinstance(module, cls)), None)
        if kind is not None:
            found.append(WeightSpec(name, kind, tuple(module.weight.shape)))  # pyright: ignore[reportArgumentType]
    return tuple(found)
