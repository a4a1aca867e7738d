"""Activation quantization: which layers take how many bits, hooks that round, and the moments of layer inputs."""

from quantdm.activations.bits import KEEP_8BIT, default_keep_8bit, layer_bits
from quantdm.activations.hooks import activation_spec, set_activation_bits_
from quantdm.activations.rounding import fake_quantize

__all__ = [
    "KEEP_8BIT",
    "activation_spec",
    "default_keep_8bit",
    "fake_quantize",
    "layer_bits",
    "set_activation_bits_",
]
