"""What a quantized model may be saved as: the tensors that `from_pretrained` will ask for, or one clear refusal."""

import copy
import re
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from transformers import PreTrainedModel

from quantdm.errors import QuantDMError
from quantdm.modules.packed import packed_layers
from quantdm.pipelines.stored import SUFFIX

Shapes = dict[str, tuple[int, ...]]

_REMEDIES = (
    (r"lora_|lokr_|base_layer|modules_to_save", "unload adapters before saving (they have files of their own)"),
    (r"\.to_(added_)?q?kv\.", "unfuse_qkv_projections() before saving"),
    (r"_ip\.|^encoder_hid_proj\.", "unload_ip_adapter() before saving"),
)


class Owned:
    """A quantizer that knows its model, so that it can look at it before anything is written."""

    _owner: "weakref.ref[Any] | None" = None

    @property
    def owner(self) -> Any | None:
        """The model; None before it is loaded."""
        return None if self._owner is None else self._owner()

    def own_(self, model: Any) -> None:
        """Belong to this model, which may be cast from now on.

        Both libraries refuse `.to(dtype)` for a model that says `is_quantized`, half-way through a pipeline: in many
        formats a cast would destroy the codes. Packed layers cast what they decode to, never their bytes.
        """
        self._owner = weakref.ref(model)
        model.is_quantized = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Belong to the copy of the model."""
        new = copy.copy(self)
        new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        if self.owner is not None:
            new._owner = weakref.ref(memo.get(id(self.owner), self.owner))
        return new

    def __getstate__(self) -> dict[str, Any]:
        """Be pickled without the model, which cannot be referred to in another process."""
        return {key: value for key, value in self.__dict__.items() if key != "_owner"}


def keys_to_save(model: Any, table: Iterable[str], state: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the tensors to write, which are exactly those that opening the model will ask for.

    Args:
        model: the quantized model.
        table: its layers that were quantized.
        state: its state dict.

    Raises:
        QuantDMError: layers were added, removed, wrapped or resized since, or share their memory, or are offloaded;
            it names the first and what to do.
    """
    changed = {f"{name}{SUFFIX}" for name in set(table) ^ packed_layers(model).keys()}
    changed |= {f"{name}{SUFFIX}" for name in table} ^ {key for key in state if key.endswith(SUFFIX)}
    if changed:
        raise _refusal(changed, model, state)
    expected = _expected_shapes(model)
    tied = getattr(model, "all_tied_weights_keys", {})
    extra = {key for key in state if key not in expected and key not in tied and not _is_unused(model, key)}
    missing = expected.keys() - state.keys()
    if extra or missing:
        raise _refusal(extra | missing, model, state)
    for key, shape in expected.items():
        if tuple(state[key].shape) != shape:
            raise _resized(model, key, tuple(state[key].shape), shape)
    _check_memory({key: state[key] for key in expected})
    return set(expected)


def _refusal(keys: set[str], model: nn.Module, state: Mapping[str, torch.Tensor]) -> QuantDMError:
    """Return the error that names the first of these keys and how to get rid of what changed."""
    changed = "\n".join(sorted(keys | {key for key in state if re.search(_REMEDIES[0][0], key)}))
    found = [remedy for pattern, remedy in _REMEDIES if re.search(pattern, changed, re.MULTILINE)]
    first = ", ".join(sorted(key.removesuffix(SUFFIX) for key in keys)[:3])
    return QuantDMError(
        f"save_pretrained: layers were added, removed or wrapped after quantization, first {first}; "
        + (" and ".join(found) or f"undo it, or dequantize() the {type(model).__name__} before saving")
    )


def _resized(model: nn.Module, name: str, got: tuple[int, ...], expected: tuple[int, ...] | None) -> QuantDMError:
    return QuantDMError(
        f"save_pretrained: {name} has the shape {got}, but {expected or 'no place'} in a {type(model).__name__} of "
        "this configuration: it could not be opened; undo the change before saving"
    )


def _expected_shapes(model: Any) -> Shapes:
    """Return the tensors that a freshly opened model of this class and configuration waits for."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        if isinstance(model, PreTrainedModel):
            fresh = type(model)(copy.deepcopy(model.config))
        else:
            config = {key: value for key, value in model.config.items() if key != "quantization_config"}
            fresh = type(model).from_config(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in fresh.state_dict().items()}
    for name, layer in packed_layers(model).items():
        shape = shapes.pop(f"{name}.weight", None)
        if shape != layer.weight_shape:
            raise _resized(model, name, layer.weight_shape, shape)
        shapes[f"{name}{SUFFIX}"] = (layer.packed.numel(),)
    untold = {*(model.all_tied_weights_keys if isinstance(model, PreTrainedModel) else ())}
    untold |= set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return {key: shape for key, shape in shapes.items() if key not in untold}


def _is_unused(model: Any, key: str) -> bool:
    """Tell whether opening ignores a tensor, or no forward pass reads it: projections that were fused and unfused."""
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    ignored += [f"^{re.escape(name)}$" for name in getattr(model, "_keys_to_ignore_on_save", None) or ()]
    if any(re.search(pattern, key) for pattern in ignored):
        return True
    attention = model.get_submodule(key.rpartition(".")[0].rpartition(".")[0])
    # newer attention modules delete the fused projection when it is undone
    is_fused = "Fused" in type(getattr(attention, "processor", None)).__name__
    return re.search(_REMEDIES[1][0], key) is not None and isinstance(attention, Attention) and not is_fused


def _check_memory(state: Mapping[str, torch.Tensor]) -> None:
    """Check that every tensor is there, and that no two are one: a file has no place for that."""
    places: dict[tuple[torch.device, int], str] = {}
    for key, tensor in state.items():
        if tensor.is_meta:
            raise QuantDMError(f"{key}: is offloaded and cannot be saved; load the model without a device map first")
        twin = places.setdefault((tensor.device, tensor.data_ptr()), key)
        if twin != key and tensor.numel():
            raise QuantDMError(
                f"save_pretrained: {key} and {twin} share their memory, which a file cannot hold; give one its own "
                "(clone it) before saving"
            )
