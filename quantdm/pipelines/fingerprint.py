"""What a pipeline is, as hashes: every part's weights, and the settings of what has none."""

import json
from typing import Any

import torch
from torch import nn

from quantdm.errors import QuantDMError
from quantdm.files import digest


def fingerprint(part: nn.Module) -> str:
    """Return the hash of a network's class, tensor names and values (independent of the loading dtype's width).

    Raises:
        QuantDMError: a tensor is offloaded or not loaded (on the meta device).
    """
    found = []
    for name, tensor in part.state_dict().items():
        if tensor.is_meta:
            raise QuantDMError(
                f"{type(part).__name__}: {name} is offloaded or not loaded; load it without a device map"
            )
        value = tensor.detach()
        found.append([name, digest(value.float() if value.is_floating_point() else value)])
    return digest(_class_name(part), found)


def fingerprint_part(part: Any) -> str:
    """Return the hash of any component of a pipeline: a network, scheduler, tokenizer, image processor."""
    if isinstance(part, nn.Module):
        return fingerprint(part)
    if hasattr(part, "get_vocab"):
        return digest(type(part).__name__, sorted(part.get_vocab().items()))
    return digest(type(part).__name__, settings_of(part))


def settings_of(part: Any) -> dict[str, Any]:
    """Return the settings of a scheduler or image processor as JSON values ({} if it tells none).

    What quantdm keeps in a scheduler (its correction) counts, as one hash; other private entries do not.
    """
    config = getattr(part, "config", None)
    told = dict(config) if config is not None else part.to_dict() if hasattr(part, "to_dict") else {}
    # DPM-Solver++ clips at -infinity, which is no JSON: it becomes a word.
    plain = json.loads(json.dumps(told, default=str), parse_constant=str)
    found = {key: value for key, value in plain.items() if not key.startswith("_")}
    return found | ({"correction": digest(plain["_quantdm"])} if "_quantdm" in plain else {})


def dtype_of(part: nn.Module) -> str | None:
    """Return the dtype of a network's first floating-point tensor that is not packed, e.g. "float32"."""
    for tensor in part.state_dict().values():
        if torch.is_tensor(tensor) and tensor.is_floating_point():
            return str(tensor.dtype).removeprefix("torch.")
    return None


def _class_name(part: nn.Module) -> str:
    return type(getattr(part, "_orig_mod", part)).__name__  # compiled: the same network
