"""Quantize a model that has just been loaded."""

from torch import nn

from quantdm.hub.config import QuantDMConfig
from quantdm.hub.quantize import model_layers, quantize_layers_


def quantize_loaded_(model: nn.Module, config: QuantDMConfig) -> None:
    quantize_layers_(model, config.schemes_for(model_layers(model)), what=config.what)
