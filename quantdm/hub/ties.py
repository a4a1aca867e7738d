"""Weights that transformers ties to each other, such as `lm_head` to the embedding."""

from transformers import PreTrainedModel

from quantdm.modules.packed import PackedLayer


def untie_packed_(model: PreTrainedModel) -> None:
    """Tie no packed layer to anything from now on: its bytes are its own, while what it was tied to stays dense."""
    for name, part in model.named_modules():
        if not isinstance(part, PreTrainedModel):
            continue
        tied = part._tied_weights_keys or {}
        part._tied_weights_keys = {k: v for k, v in tied.items() if not (_is_packed(part, k) or _is_packed(part, v))}
        if name == "" or part.all_tied_weights_keys:
            tied = part.all_tied_weights_keys
            part.all_tied_weights_keys = {
                k: v for k, v in tied.items() if not (_is_packed(part, k) or _is_packed(part, v))
            }


def _is_packed(model: PreTrainedModel, key: str) -> bool:
    try:
        return isinstance(model.get_submodule(key.rpartition(".")[0]), PackedLayer)
    except AttributeError:  # a pattern, or another model's layer
        return False
