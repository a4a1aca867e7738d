"""Trace a denoiser once, on a weightless copy: its graph and the seams of its long skips."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from quantdm.denoisers.assembly import build_graph
from quantdm.denoisers.example_inputs import failure, find_inputs, meta_copy, signature, to_meta
from quantdm.denoisers.graph import Graph
from quantdm.denoisers.trace import ForwardError, Trace, trace_forward
from quantdm.denoisers.weights import weight_specs
from quantdm.errors import QuantDMError, nearest
from quantdm.files import digest

_CACHE: dict[str, "Analysis"] = {}
_GIVEN: dict[str, dict[str, Any]] = {}  # class and configuration -> the example inputs that a user gave last


@dataclass(frozen=True)
class Analysis:
    """What one trace gives: the raw trace and the graph made of it."""

    trace: Trace
    graph: Graph


def trace_graph(denoiser: nn.Module, *, example_inputs: Mapping[str, Any] | None = None) -> Graph:
    """Return the data-flow graph of a diffusers denoiser, traced on the meta device.

    A weightless copy made from the class and its configuration is traced, so real, meta and quantized denoisers give
    the same graph; nothing is computed and the denoiser is not touched. The result is cached.

    Args:
        denoiser: any diffusers model (`from_config`, `config`).
        example_inputs: keyword arguments of one forward call; without them they are inferred from the configuration.

    Raises:
        QuantDMError: not a diffusers model, inputs that cannot be inferred, a forward that fails on the meta device,
            or modules that no longer match the configuration (fused projections, adapters).

    Blocks, roots and hops as in Qua2SeDiMo (arXiv 2412.14628).
    """
    return analyse(denoiser, example_inputs=example_inputs).graph


def analyse(denoiser: nn.Module, *, example_inputs: Mapping[str, Any] | None = None) -> Analysis:
    """Return the cached trace and graph of a denoiser (see `trace_graph`).

    Example inputs that were given once serve from then on: asked without any, a denoiser of the same class and
    configuration is seen as it was with them.
    """
    config = _config(denoiser)
    network = digest(
        f"{type(denoiser).__module__}.{type(denoiser).__qualname__}",
        json.loads(json.dumps(config, sort_keys=True, default=str)),
    )
    if example_inputs is None:
        example_inputs = _GIVEN.get(network)
    key = digest(network, None if example_inputs is None else signature(example_inputs))
    if key not in _CACHE:
        copy = meta_copy(denoiser, config)
        if example_inputs is None:
            inputs, trace = find_inputs(copy, config, trace_forward)
        else:
            inputs = to_meta(example_inputs)
            try:
                trace = trace_forward(copy, dict(inputs))
            except ForwardError as error:
                raise failure(copy, inputs, error) from error.__cause__
        _CACHE[key] = Analysis(trace, build_graph(trace))
        if example_inputs is not None:
            _GIVEN[network] = inputs
    found = _CACHE[key]
    _check_modules(denoiser, [s.name for s in found.trace.specs])
    return found


def _config(denoiser: nn.Module) -> dict[str, Any]:
    config = getattr(denoiser, "config", None)
    if not isinstance(denoiser, nn.Module) or not isinstance(config, Mapping) or not hasattr(denoiser, "from_config"):
        raise QuantDMError(
            f"denoiser: got {type(denoiser).__name__}, expected a diffusers model with a config; "
            "pass pipe.unet or pipe.transformer (not a pipeline or a compiled wrapper)"
        )
    return {k: v for k, v in config.items() if k not in ("quantization_config", "_name_or_path")}


_ADAPTER = ".lora_"  # in the names of the layers that peft puts beside a layer


def _check_modules(denoiser: nn.Module, layers: list[str]) -> None:
    """Refuse a denoiser whose layers are not those of its configuration."""
    present = {name for name, _ in denoiser.named_modules()}
    odd = [name for name in layers if name not in present]
    odd += sorted({s.name for s in weight_specs(denoiser)} - set(layers))
    if odd:
        if any(_ADAPTER in name for name in odd):
            raise QuantDMError(
                f"{type(denoiser).__name__}: an adapter is loaded ({odd[0]}); fuse it first, pipe.fuse_lora() and then "
                "pipe.unload_lora_weights(), or unload it"
            )
        raise QuantDMError(
            f"{type(denoiser).__name__}: {len(odd)} layers do not follow from its configuration, the first is "
            f"{odd[0]} ({nearest(odd[0], layers)}); undo fused projections (unfuse_qkv_projections)"
        )
