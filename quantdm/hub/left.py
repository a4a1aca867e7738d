"""What a quantized network leaves in its original precision, by kind: nothing that weighs is left out silently."""

from collections import Counter
from collections.abc import Mapping

from torch import nn

from quantdm.denoisers.weights import CONVOLUTIONS
from quantdm.modules import PackedLayer
from quantdm.pipelines.stored import SUFFIX

LEAST = 0.01  # share of the whole from which on it is told
LAYERS, TABLES, BIASES, NORMS = "layers left original", "embedding tables", "biases", "norms"


def left_of(model: nn.Module, nbytes: Mapping[str, int]) -> Counter[str]:
    """Return kind -> bytes of a network's tensors that are not packed.

    Args:
        model: the network, perhaps on the meta device.
        nbytes: tensor of its state -> bytes in which it is stored; packed ones end in `SUFFIX`.
    """
    found: Counter[str] = Counter()
    for key, size in nbytes.items():
        if not key.endswith(SUFFIX):
            found[_kind(model, key)] += size
    return found


def _kind(model: nn.Module, key: str) -> str:
    path, _, name = key.rpartition(".")
    if name == "bias":
        return BIASES
    try:
        owner = model.get_submodule(path)
    except AttributeError:  # transformers reads it under another name
        return key
    if isinstance(owner, nn.Embedding):
        return TABLES
    if name == "weight" and isinstance(owner, (nn.Linear, *CONVOLUTIONS)):
        return LAYERS
    return NORMS if "norm" in type(owner).__name__.lower() and not isinstance(owner, PackedLayer) else key


def told_left(left: Mapping[str, int], total: int) -> str | None:
    """Return one line on what is left unquantized and weighs more than LEAST of `total` bytes; None: nothing does."""
    heavy = sorted(((size, kind) for kind, size in left.items() if size > LEAST * total), reverse=True)
    if not heavy:
        return None
    parts = [f"{kind} {size / 1e6:,.3f} MB ({100 * size / total:.1f} %)" for size, kind in heavy]
    return f"left unquantized: {', '.join(parts)}"
