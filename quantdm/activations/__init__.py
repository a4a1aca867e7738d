"""Activation quantization: which inputs take how many bits, hooks that round, and the moments of layer inputs."""

from quantdm.activations.hooks import activation_spec, set_activation_bits_
from quantdm.activations.rounding import quantize_activations
from quantdm.activations.sensitive import sensitive_types, usual_activations

__all__ = ["activation_spec", "quantize_activations", "sensitive_types", "set_activation_bits_", "usual_activations"]
