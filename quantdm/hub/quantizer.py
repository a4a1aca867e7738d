"""The plug-ins: how diffusers and transformers load, save and undo a quantdm model."""

import re
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn
from transformers.quantizers.base import HfQuantizer

from quantdm.errors import QuantDMError
from quantdm.hub.checkpoint import (
    HEADER_KEY,
    SUFFIX,
    LayerEntry,
    check_keys,
    check_loaded,
    encode_table,
    layer_table,
    prepare_layers_,
    read_headers,
)
from quantdm.hub.config import QuantDMConfig
from quantdm.hub.layers import dequantize_layers_, quantize_layers_
from quantdm.modules.activations import set_activation_bits_
from quantdm.modules.layers import PackedLayer, packed_layers


def _quantize_loaded_(model: nn.Module, config: QuantDMConfig) -> None:
    if config.schemes is None:
        raise QuantDMError(
            "quantization_config: has no recipe; pass QuantDMConfig(recipe=...) to quantize while loading"
        )
    quantize_layers_(model, config.schemes, what=f"recipe for {config.model}" if config.model else "recipe")


class QuantDMQuantizer(DiffusersQuantizer):
    """quantdm inside diffusers' `from_pretrained` and `save_pretrained`."""

    quantization_config: QuantDMConfig
    # A module that the exporter kept in fp32 is loaded in fp32 again: reloading is exact in every dtype.
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: QuantDMConfig, pre_quantized: bool = True, **kwargs: Any) -> None:
        super().__init__(quantization_config, pre_quantized=pre_quantized, **kwargs)
        self.table: dict[str, LayerEntry] = {}
        self._loaded_keys: list[str] | None = None

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Read the layer table before the skeleton is prepared; a shard's true keys count, not those of the index."""
        if self.pre_quantized:
            self.table, keys = read_headers(checkpoint_files)
            self._loaded_keys = keys if len(checkpoint_files) > 1 else loaded_keys
        return loaded_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Notice a dense single file, which diffusers announces as quantized: it is quantized on the fly."""
        if self._loaded_keys is None and self.pre_quantized:
            if any(key.endswith(SUFFIX) for key in state_dict):
                raise QuantDMError(
                    "from_single_file: the file is a quantdm export; open its directory with from_pretrained"
                )
            self.pre_quantized = False
        return state_dict

    def _process_model_before_weight_loading(
        self, model: Any, keep_in_fp32_modules: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        prepare_layers_(model, self.table, keep_in_fp32=keep_in_fp32_modules or ())
        ignored = model._keys_to_ignore_on_load_unexpected or []
        loaded = [key for key in self._loaded_keys or [] if not any(re.search(pattern, key) for pattern in ignored)]
        check_keys(model.state_dict(), loaded)

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

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.pre_quantized:
            check_loaded(model)
        else:
            _quantize_loaded_(model, self.quantization_config)
            self.table = layer_table(model)
            self.pre_quantized = True
        set_activation_bits_(model, self.quantization_config.activations)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = True
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Add the layer table to the header of every file."""
        if not safe_serialization:
            raise QuantDMError(
                "save_pretrained: quantdm models are saved as safetensors; leave safe_serialization=True"
            )
        packed = {key.removesuffix(SUFFIX) for key in state_dict if key.endswith(SUFFIX)}
        if packed != set(self.table):
            different = sorted(packed ^ set(self.table))[:3]
            raise QuantDMError(
                f"save_pretrained: layers were added, removed or wrapped after quantization, first "
                f"{', '.join(different)}; unload  adapters before saving"
            )
        return state_dict, {HEADER_KEY: encode_table(self.table)}

    def _dequantize(self, model: Any) -> Any:
        set_activation_bits_(model, None)
        dequantize_layers_(model)
        strip_config_(model)
        return model

    @property
    def is_serializable(self) -> bool:
        """Always: the packed bytes are what is saved."""
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


class QuantDMHfQuantizer(HfQuantizer):
    """quantdm inside transformers' `from_pretrained` and `save_pretrained` (text encoders)."""

    quantization_config: QuantDMConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        if not checkpoint_files or any(Path(file).suffix != ".safetensors" for file in checkpoint_files):
            raise QuantDMError("checkpoint: got no safetensors files, expected those that save_pretrained wrote")
        table, keys = read_headers(checkpoint_files)
        kept = model._get_dtype_plan(model.dtype)
        prepare_layers_(model, table, keep_in_fp32={name for key in kept for name in re.findall(r"\w+", key)})
        # Names in the file may have another prefix, which transformers maps: what must agree is how many there are.
        packed = sum(key.endswith(SUFFIX) for key in keys)
        expected = model.state_dict().keys() - model.all_tied_weights_keys.keys()
        if packed != len(table) or len(keys) < len(expected):
            raise QuantDMError(
                f"checkpoint does not fit its layer table: got {packed} packed tensors of {len(keys)}, expected "
                f"{len(table)} of {len(expected)}; export it again"
            )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            for name, layer in packed_layers(model).items():
                if not getattr(layer.packed, "_is_hf_initialized", False):  # transformers' mark of what a file gave
                    raise QuantDMError(f"{name}: its packed weight was not in the checkpoint; export it again")
            check_loaded(model)
        elif self.quantization_config.activations is not None:
            raise QuantDMError("activations: are quantized in denoisers only, not in text encoders; leave them out")
        else:
            _quantize_loaded_(model, self.quantization_config)
            self.pre_quantized = True
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        """Add the layer table to the header of every file."""
        return None, {HEADER_KEY: encode_table(layer_table(model))}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dequantize_layers_(model)
        return model

    def is_serializable(self) -> bool:
        """Always: the packed bytes are what is saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Never: codes have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Layers decode with plain torch operations."""
        return True
