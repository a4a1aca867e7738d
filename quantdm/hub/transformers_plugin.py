"""The plug-in of transformers: how text encoders are loaded, saved and undone."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from quantdm.errors import QuantDMError
from quantdm.hub.checkpoint import (
    check_bytes,
    check_loaded,
    check_sizes,
    place_of,
    prepare_layers_,
)
from quantdm.hub.config import QuantDMConfig
from quantdm.hub.header import Header, LayerEntry, encode_header, layer_table, read_headers
from quantdm.hub.loaded import quantize_loaded_
from quantdm.hub.quantize import dequantize_layers_, model_layers
from quantdm.hub.saving import Owned, keys_to_save
from quantdm.hub.ties import untie_packed_
from quantdm.modules.packed import packed_layers
from quantdm.pipelines.stored import HEADER_KEY, SUFFIX


class QuantDMHfQuantizer(Owned, HfQuantizer):
    """quantdm inside transformers' `from_pretrained` and `save_pretrained` (text encoders)."""

    quantization_config: QuantDMConfig

    def __init__(self, quantization_config: QuantDMConfig, pre_quantized: bool = True, **kwargs: Any) -> None:
        super().__init__(quantization_config, pre_quantized=pre_quantized, **kwargs)
        self.table: dict[str, LayerEntry] = {}
        self._header: Header | None = None
        self._where = ""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        if not checkpoint_files or any(Path(file).suffix != ".safetensors" for file in checkpoint_files):
            raise QuantDMError("checkpoint: got no safetensors files, expected those that save_pretrained wrote")
        self._header, places = read_headers(checkpoint_files)
        self._where = place_of(checkpoint_files)
        kept = model._get_dtype_plan(model.dtype)
        fp32 = {name for key in kept for name in re.findall(r"\w+", key)}
        prepare_layers_(model, self._header.table, self._where, keep_in_fp32=fp32)
        untie_packed_(model)
        # Names in the file may have another prefix, which transformers maps: what must agree is how many there are.
        packed, layers = sum(key.endswith(SUFFIX) for key in places), len(self._header.table)
        expected = model.state_dict().keys() - model.all_tied_weights_keys.keys()
        if packed != layers or len(places) < len(expected):
            raise QuantDMError(
                f"{self._where}: checkpoint does not fit its layer table: got {packed} packed tensors of "
                f"{len(places)}, expected {layers} of {len(expected)}; export it again"
            )
        check_sizes(model, places)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._header is not None:
            tensors = model.state_dict(keep_vars=True)
            for name, tensor in tensors.items():
                # transformers' mark of what a file gave; offloaded tensors (meta) arrive when they are needed
                if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
                    raise QuantDMError(f"{name}: was not in the checkpoint {self._where}; export it again")
            expected = {f"{name}{SUFFIX}": value for name, value in self._header.packed.items()}
            check_bytes(
                {key: tensor for key, tensor in tensors.items() if not tensor.is_meta},
                expected,
                dict.fromkeys(expected, self._where),
            )
            check_loaded(model)
        elif self.quantization_config.activations is not None:
            raise QuantDMError("activations: are quantized in denoisers only, not in text encoders; leave them out")
        else:
            for layer in model_layers(model):
                if not getattr(model.get_submodule(layer.name).weight, "_is_hf_initialized", False):
                    raise QuantDMError(f"{layer.name}: its weight was not in the checkpoint; copy or download it again")
            quantize_loaded_(model, self.quantization_config)
            self.pre_quantized = True
        self.table = layer_table(model)
        self.own_(model)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        """Add the layer table to the header of every file.

        Its checksums are those of the packed weights alone: transformers may rename or rearrange other tensors. With an
        adapter on it, the file gets the weights of the adapter alone, and no table.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        packed = {f"{name}{SUFFIX}": layer.packed for name, layer in packed_layers(model).items()}
        return None, {HEADER_KEY: encode_header(layer_table(model), packed)}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dequantize_layers_(model)
        return model

    def is_serializable(self) -> bool:
        """Tell that it can be saved; asked before a folder is made, it refuses what `from_pretrained` would not open.

        Raises:
            QuantDMError: says what was added, removed or wrapped since the model was quantized, and the remedy.
        """
        model = self.owner
        if model is not None and not getattr(model, "_hf_peft_config_loaded", False):
            keys_to_save(model, self.table, model.state_dict())
        return True

    @property
    def is_trainable(self) -> bool:
        """Never: codes have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Layers decode with plain torch operations."""
        return True
