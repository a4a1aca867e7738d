"""Weights that transformers ties to each other, such as `lm_head` to the embedding."""

from collections.abc import Mapping

from transformers import PreTrainedModel

from quantdm.modules.packed import PackedLayer


def untie_packed_(model: PreTrainedModel) -> None:
    """Tie no packed weight to anything from now on: its bytes are its own, while what it was tied to stays dense."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part._tied_weights_keys = _without_packed(part, part._tied_weights_keys or {})
            part.all_tied_weights_keys = _without_packed(part, part.all_tied_weights_keys)


def _without_packed(model: PreTrainedModel, tied: Mapping[str, str]) -> dict[str, str]:
    return {key: twin for key, twin in tied.items() if not (_is_packed(model, key) or _is_packed(model, twin))}


def _is_packed(model: PreTrainedModel, key: str) -> bool:
    path, _, name = key.rpartition(".")
    try:
        return name == "weight" and isinstance(model.get_submodule(path), PackedLayer)
    except AttributeError:  # a pattern
        return False
