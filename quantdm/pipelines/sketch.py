"""A sketch of a network's weights: tells other weights of the same architecture, in whatever dtype they are opened.

Weights may be searched in one dtype and quantized in another, so a sketch holds three hashes of the same samples: of
the values as they are, rounded to bfloat16, and rounded to float16. Two networks have the same weights if one hash is
equal: those of a network and of its rounded copy share that of the rounding. Fusing a LoRA or training changes all.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from quantdm.errors import QuantDMError

SAMPLES = 4096  # values per tensor: what changes a weight changes many of its values
_KINDS = (None, torch.bfloat16, torch.float16)

Sketch = tuple[str, ...]


def sketch(tensors: Iterable[tuple[str, torch.Tensor]]) -> Sketch:
    """Return the sketch of named tensors: vectors, which tuning may change, and integers are passed over.

    Returns:
        Three hashes; () where a tensor is not there (on the meta device).
    """
    hashes = [hashlib.sha256() for _ in _KINDS]
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.ndim < 2:
            continue
        if tensor.is_meta:
            return ()
        flat = tensor.detach().flatten()
        some = flat[:: max(1, -(-flat.numel() // SAMPLES))].cpu().float()
        for found, dtype in zip(hashes, _KINDS, strict=True):
            values = some if dtype is None else some.to(dtype).float()
            found.update(f"{name} {tuple(tensor.shape)}".encode())
            found.update(values.numpy().tobytes())
    return tuple(found.hexdigest()[:16] for found in hashes)


def sketch_of(model: nn.Module) -> Sketch:
    """Return the sketch of a network in memory."""
    return sketch(sorted((name, parameter) for name, parameter in model.named_parameters()))


def check_same_weights(known: Mapping[str, Sequence[str]], now: Mapping[str, Sketch]) -> None:
    """Check that networks have the weights that a recipe was found on; what is not known of them is not checked.

    Args:
        known: part -> sketch, as a recipe has them.
        now: part -> sketch of what it is applied to.

    Raises:
        QuantDMError: names the part with other weights, and says how to apply the recipe all the same.
    """
    for part, seen in now.items():
        before = known.get(part, ())
        if before and seen and not set(zip(before, _KINDS, strict=False)) & set(zip(seen, _KINDS, strict=False)):
            raise QuantDMError(
                f"recipe: was found on other weights of {part} than it is applied to (a fused LoRA, a finetune, or "
                "another model of this architecture); search again on these, or accept what was found on the others: "
                "same_architecture=True, --same-architecture"
            )
