"""Every part of a pipeline in one line: class, weights, bytes on disk."""

import math
from typing import Any

from torch import nn

from quantdm.modules import packed_layers
from quantdm.pipelines.source import Source


def parts_of(main: nn.Module, source: Source | None) -> list[dict[str, Any]]:
    """Return a record of every part of a pipeline, networks first, the largest of them before others.

    Args:
        main: the denoiser, all that there is where only a configuration is at hand.
        source: the pipeline, where it lies on this disk.

    Returns:
        name, class, num_weights (None: no network), nbytes of its files (None: none of its own), quantized or not.
    """
    pipe = None if source is None else source.pipe
    components = {"": main} if pipe is None or isinstance(pipe, nn.Module) else pipe.components
    found = [_record(name, part, source) for name, part in components.items() if part is not None]
    return sorted(found, key=lambda part: (part["num_weights"] is None, -(part["num_weights"] or 0)))


def _record(name: str, part: Any, source: Source | None) -> dict[str, Any]:
    network = isinstance(part, nn.Module)
    stored = None if source is None else source.parts.get(name)
    files = () if stored is None else stored.files
    size = sum(file.stat().st_size for file in files)
    if not files and network and not any(tensor.is_meta for tensor in part.parameters()):
        size = sum(tensor.numel() * tensor.element_size() for tensor in part.parameters())
    return {
        "name": name,
        "class": type(part).__name__,
        "num_weights": _weights(part) if network else None,
        "nbytes": size or None,
        "quantized": network and bool(packed_layers(part)),
    }


def _weights(model: nn.Module) -> int:
    """Return how many weights a network has; those of packed layers are not their bytes."""
    packed = packed_layers(model)
    own = {f"{name}.{key}" for name in packed for key in ("packed", "codes")}
    plain = sum(tensor.numel() for name, tensor in model.named_parameters() if name not in own)
    return plain + sum(math.prod(layer.weight_shape) for layer in packed.values())
