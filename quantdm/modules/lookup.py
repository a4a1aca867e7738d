"""The state dict of a model with packed layers: it lists what is stored, and answers for `<layer>.weight` as well."""

from collections import OrderedDict
from typing import Any

from torch import nn

from quantdm.modules.view import WeightView


class PackedStateDict(OrderedDict[str, Any]):
    """A state dict whose packed layers can also be asked for their weight: `state["<layer>.weight"]` is a view of it.

    Foreign code looks shapes and devices up that way (adapters for FLUX do). Iterating lists the packed bytes alone,
    so that saving, offloading and comparing see what is there.
    """

    def __init__(self, model: nn.Module, stored: Any) -> None:
        super().__init__(stored)
        self._model = model
        self._metadata = getattr(stored, "_metadata", None)  # load_state_dict reads the versions of modules from it

    def __missing__(self, key: str) -> WeightView:
        path, _, name = key.rpartition(".")
        try:
            found = getattr(self._model.get_submodule(path), name) if name == "weight" else None
        except AttributeError:
            found = None
        if not isinstance(found, WeightView):
            raise KeyError(key)
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Be copied and pickled as the plain state dict, without the model."""
        plain = OrderedDict(self)
        plain.__dict__["_metadata"] = self._metadata
        return plain.__reduce_ex__(protocol)


def _answer_for_weights(model: nn.Module, stored: Any, prefix: str, local_metadata: Any) -> PackedStateDict | None:
    return None if prefix or isinstance(stored, PackedStateDict) else PackedStateDict(model, stored)


def answer_for_weights_(model: nn.Module) -> None:
    """Let the state dict of a model answer for the weights of its packed layers; calling it again changes nothing."""
    if _answer_for_weights not in model._state_dict_hooks.values():
        # the public hook, `register_state_dict_post_hook`, cannot put another dict in the place of the first
        model._register_state_dict_hook(_answer_for_weights)
