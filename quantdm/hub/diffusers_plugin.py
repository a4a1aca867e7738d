"""The plug-in of diffusers: how `from_pretrained` and `save_pretrained` load, save and undo a quantdm model."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from quantdm.activations.hooks import activation_spec, set_activation_bits_
from quantdm.errors import QuantDMError
from quantdm.hub.checkpoint import (
    check_bytes,
    check_filled,
    check_keys,
    check_loaded,
    expected_checksums,
    place_of,
    prepare_layers_,
)
from quantdm.hub.config import QuantDMConfig
from quantdm.hub.header import Header, LayerEntry, encode_header, layer_table, read_headers
from quantdm.hub.loaded import quantize_loaded_
from quantdm.hub.quantize import dequantize_layers_
from quantdm.hub.saving import Owned, keys_to_save
from quantdm.modules.packed import PackedLayer
from quantdm.pipelines.stored import HEADER_KEY, SUFFIX


class QuantDMQuantizer(Owned, DiffusersQuantizer):
    """quantdm inside diffusers' `from_pretrained` and `save_pretrained`."""

    quantization_config: QuantDMConfig
    # A module that the exporter kept in fp32 is loaded in fp32 again: reloading is exact in every dtype.
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: QuantDMConfig, pre_quantized: bool = True, **kwargs: Any) -> None:
        super().__init__(quantization_config, pre_quantized=pre_quantized, **kwargs)
        self.table: dict[str, LayerEntry] = {}
        self._header: Header | None = None
        self._where = ""
        self._places: dict[str, Path] = {}  # tensor -> its file
        self._loaded_keys: Iterable[str] = ()
        self._checksums: dict[str, int] = {}

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Read the layer table before the skeleton is prepared; a shard's true keys count, not those of the index."""
        if self.pre_quantized:
            self._header, self._places = read_headers(checkpoint_files)
            self._where = place_of(checkpoint_files)
            self.table = self._header.table
            self._loaded_keys = self._places if len(checkpoint_files) > 1 else loaded_keys
        return loaded_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Check the bytes of a file; notice a dense single file, which diffusers announces as quantized.

        That one is quantized on the fly.
        """
        if self._header is None and self.pre_quantized:
            if any(key.endswith(SUFFIX) for key in state_dict):
                raise QuantDMError(
                    "from_single_file: the file is a quantdm export; open its directory with from_pretrained"
                )
            self.pre_quantized = False
        check_bytes(state_dict, self._checksums, self._places)
        return state_dict

    def _process_model_before_weight_loading(
        self, model: Any, keep_in_fp32_modules: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self._header is None:  # on the fly
            return
        prepare_layers_(model, self.table, self._where, keep_in_fp32=keep_in_fp32_modules or ())
        ignored = model._keys_to_ignore_on_load_unexpected or []
        loaded = [key for key in self._loaded_keys if not any(re.search(pattern, key) for pattern in ignored)]
        keys = model.state_dict().keys()
        check_keys(keys, loaded, self._where)
        self._checksums = expected_checksums(self._header, keys, self._where)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Tell whether a tensor of the checkpoint is the bytes of a packed layer."""
        layer, _, name = param_name.rpartition(".")
        return name == "packed" and isinstance(model.get_submodule(layer), PackedLayer)

    def check_quantized_param_shape(
        self, param_name: str, current_param: torch.Tensor, loaded_param: torch.Tensor
    ) -> bool:
        """Refuse bytes of another size."""
        raise QuantDMError(
            f"{param_name}: got {tuple(loaded_param.shape)} bytes, expected {tuple(current_param.shape)}; the "
            "checkpoint does not fit its layer table: export it again"
        )

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, torch.Tensor],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the raw bytes of the checkpoint into their layer."""
        raw = state_dict[param_name]  # not param_value: diffusers has cast that one if it is a floating tensor
        layer = model.get_submodule(param_name.rpartition(".")[0])
        if raw.dtype != torch.uint8:
            raise QuantDMError(f"{param_name}: got {raw.dtype}, expected torch.uint8; export it again")
        raw = raw.to(target_device)
        if raw.data_ptr() % 4 or raw.storage_offset() % 4:  # scales are read in place: they need their alignment
            raw = raw.clone()
        layer._parameters["packed"] = nn.Parameter(raw, requires_grad=False)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.quantization_config.tell_inputs(model)
        if self.pre_quantized:
            check_loaded(model)
        else:
            check_filled(model)
            quantize_loaded_(model, self.quantization_config)
            self.table = layer_table(model)
            self.pre_quantized = True
            # from_single_file does not: the model would be saved as if it were dense, and opened with random weights.
            model.register_to_config(quantization_config=self.quantization_config)
        set_activation_bits_(model, self.quantization_config.activations)
        self.own_(model)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = True
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Add the layer table to the header of every file."""
        if not safe_serialization:
            raise QuantDMError(
                "save_pretrained: quantdm models are saved as safetensors; leave safe_serialization=True"
            )
        model = self.owner
        if model is None:
            raise QuantDMError("save_pretrained: the quantizer belongs to no model; load or quantize it again")
        keys = keys_to_save(model, self.table, state_dict)
        kept = {key: tensor for key, tensor in state_dict.items() if key in keys}
        return kept, {HEADER_KEY: encode_header(layer_table(model), kept)}

    def _dequantize(self, model: Any) -> Any:
        spec = activation_spec(model)
        set_activation_bits_(model, None)
        try:
            dequantize_layers_(model)
        except QuantDMError:
            set_activation_bits_(model, spec)
            raise
        strip_config_(model)
        return model

    @property
    def is_serializable(self) -> bool:
        """Tell that it can be saved; asked before a folder is made, it refuses what `from_pretrained` would not open.

        Raises:
            QuantDMError: says what was added, removed or wrapped since the model was quantized, and the remedy.
        """
        if self.owner is not None:
            keys_to_save(self.owner, self.table, self.owner.state_dict())
        return True

    @property
    def is_trainable(self) -> bool:
        """Never: codes have no gradient (an un-fused LoRA on top of them does)."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Layers decode with plain torch operations."""
        return True


def strip_config_(model: Any) -> None:
    """Forget that a diffusers model was quantized, so that saving it writes an ordinary model."""
    gone = ("quantization_config", "_pre_quantization_dtype")
    model._internal_dict = FrozenDict({key: value for key, value in model._internal_dict.items() if key not in gone})
    model.__dict__.pop("quantization_method", None)
