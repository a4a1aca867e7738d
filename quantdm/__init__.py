"""quantdm: explainable mixed-precision quantization for diffusion pipelines.

Importing it registers it with diffusers and transformers, so that `from_pretrained` opens what it saved.
"""

from importlib.metadata import PackageNotFoundError, version

from quantdm.correction import Correction, apply_correction, fit_correction, load_correction, remove_correction
from quantdm.corridor import demo
from quantdm.denoisers.graph import Graph, trace_graph
from quantdm.denoisers.layers import LayerRecord, list_layers
from quantdm.denoisers.pipeline import generate, get_denoiser, load_pipeline
from quantdm.denoisers.protocol import Protocol, load_protocol
from quantdm.errors import QuantDMError
from quantdm.export import export_pipeline
from quantdm.hub import QuantDMConfig, apply_recipe, register
from quantdm.modules import set_activation_bits_, set_residency
from quantdm.quantizers import QuantizedWeight, quantize_weight
from quantdm.recipe import ActivationSpec, Recipe, load_recipe
from quantdm.report import write_report
from quantdm.schemes import QuantConfig, Scheme
from quantdm.search.evaluation import evaluate

# After this line `quantdm.search` is the function; the package of the same name stays importable as
# `quantdm.search.bank` and so on, because it is loaded already.
from quantdm.search.search import Effort, search
from quantdm.surrogates import select

try:
    __version__ = version("quantdm")
except PackageNotFoundError:  # a source tree on the path, never installed
    __version__ = "0+unknown"

__all__ = [
    "ActivationSpec",
    "Correction",
    "Effort",
    "Graph",
    "LayerRecord",
    "Protocol",
    "QuantConfig",
    "QuantDMConfig",
    "QuantDMError",
    "QuantizedWeight",
    "Recipe",
    "Scheme",
    "apply_correction",
    "apply_recipe",
    "demo",
    "evaluate",
    "export_pipeline",
    "fit_correction",
    "generate",
    "get_denoiser",
    "list_layers",
    "load_correction",
    "load_pipeline",
    "load_protocol",
    "load_recipe",
    "quantize_weight",
    "register",
    "remove_correction",
    "search",
    "select",
    "set_activation_bits_",
    "set_residency",
    "trace_graph",
    "write_report",
]

register()
