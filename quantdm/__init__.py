"""quantdm: explainable mixed-precision quantization for diffusion pipelines.

Importing it registers it with diffusers and transformers, so that `from_pretrained` opens what it saved. Neither of
them, nor torch, is imported before it is needed: `quantdm --help` and `quantdm status` answer at once.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from quantdm.registration import register_when_imported

if TYPE_CHECKING:
    from quantdm.activations import set_activation_bits_, usual_activations
    from quantdm.activations.choose import choose_activations
    from quantdm.activations.observe import observe_ranges
    from quantdm.allocation import select
    from quantdm.correction import Correction, apply_correction, fit_correction, load_correction, remove_correction
    from quantdm.corridor.demo import demo
    from quantdm.corridor.run import run
    from quantdm.denoisers.analysis import trace_graph
    from quantdm.denoisers.graph import Graph
    from quantdm.denoisers.inventory import LayerRecord, list_layers
    from quantdm.denoisers.tables import TableRecord, list_tables
    from quantdm.errors import QuantDMError
    from quantdm.hub import QuantDMConfig, apply_recipe, register
    from quantdm.hub.export import export_pipeline
    from quantdm.hub.lora import fuse_lora, unfuse_lora
    from quantdm.metrics.evaluate import evaluate
    from quantdm.modules import set_residency
    from quantdm.pipelines.capture import capture_inputs
    from quantdm.pipelines.generate import generate
    from quantdm.pipelines.loading import load_pipeline
    from quantdm.pipelines.parts import get_denoiser
    from quantdm.pipelines.protocol import Protocol, load_protocol
    from quantdm.pipelines.subject import Subject, look_at
    from quantdm.quantizers import QuantizedWeight, quantize_weight
    from quantdm.recipe import ActivationScheme, ActivationSpec, CalibrationSpec, Recipe, load_recipe
    from quantdm.report import write_report
    from quantdm.runs.search import search
    from quantdm.runs.settings import Effort
    from quantdm.runs.whole import select_pipeline
    from quantdm.schemes import QuantConfig, Scheme

try:
    __version__ = version("quantdm")
except PackageNotFoundError:  # a source tree on the path, never installed
    __version__ = "0+unknown"

# Module -> the public names that it is opened for, as above.
_HOMES = {
    "quantdm.activations": (
        "set_activation_bits_",
        "usual_activations",
    ),
    "quantdm.activations.choose": ("choose_activations",),
    "quantdm.activations.observe": ("observe_ranges",),
    "quantdm.allocation": ("select",),
    "quantdm.correction": (
        "Correction",
        "apply_correction",
        "fit_correction",
        "load_correction",
        "remove_correction",
    ),
    "quantdm.corridor.demo": ("demo",),
    "quantdm.corridor.run": ("run",),
    "quantdm.denoisers.analysis": ("trace_graph",),
    "quantdm.denoisers.graph": ("Graph",),
    "quantdm.denoisers.inventory": (
        "LayerRecord",
        "list_layers",
    ),
    "quantdm.denoisers.tables": (
        "TableRecord",
        "list_tables",
    ),
    "quantdm.errors": ("QuantDMError",),
    "quantdm.hub": (
        "QuantDMConfig",
        "apply_recipe",
        "register",
    ),
    "quantdm.hub.export": ("export_pipeline",),
    "quantdm.hub.lora": (
        "fuse_lora",
        "unfuse_lora",
    ),
    "quantdm.metrics.evaluate": ("evaluate",),
    "quantdm.modules": ("set_residency",),
    "quantdm.pipelines.capture": ("capture_inputs",),
    "quantdm.pipelines.generate": ("generate",),
    "quantdm.pipelines.loading": ("load_pipeline",),
    "quantdm.pipelines.parts": ("get_denoiser",),
    "quantdm.pipelines.protocol": (
        "Protocol",
        "load_protocol",
    ),
    "quantdm.pipelines.subject": (
        "Subject",
        "look_at",
    ),
    "quantdm.quantizers": (
        "QuantizedWeight",
        "quantize_weight",
    ),
    "quantdm.recipe": (
        "ActivationScheme",
        "ActivationSpec",
        "CalibrationSpec",
        "Recipe",
        "load_recipe",
    ),
    "quantdm.report": ("write_report",),
    "quantdm.runs.search": ("search",),
    "quantdm.runs.settings": ("Effort",),
    "quantdm.runs.whole": ("select_pipeline",),
    "quantdm.schemes": (
        "QuantConfig",
        "Scheme",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ActivationScheme",
    "ActivationSpec",
    "CalibrationSpec",
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
    "Subject",
    "TableRecord",
    "apply_correction",
    "apply_recipe",
    "capture_inputs",
    "choose_activations",
    "demo",
    "evaluate",
    "export_pipeline",
    "fit_correction",
    "fuse_lora",
    "generate",
    "get_denoiser",
    "list_layers",
    "list_tables",
    "load_correction",
    "load_pipeline",
    "load_protocol",
    "load_recipe",
    "look_at",
    "observe_ranges",
    "quantize_weight",
    "register",
    "remove_correction",
    "run",
    "search",
    "select",
    "select_pipeline",
    "set_activation_bits_",
    "set_residency",
    "trace_graph",
    "unfuse_lora",
    "usual_activations",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name, or a room of the package, when it is first asked for."""
    if name in _HOME_OF:
        found = getattr(import_module(_HOME_OF[name]), name)
        globals()[name] = found
        return found
    if not name.startswith("_") and find_spec(f"quantdm.{name}") is not None:
        return import_module(f"quantdm.{name}")
    raise AttributeError(f"module 'quantdm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_imported()
