"""How much every layer of a denoiser multiplies, counted in its trace."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from quantdm.denoisers.analysis import analyse


def layer_macs(denoiser: nn.Module, *, example_inputs: Mapping[str, Any] | None = None) -> dict[str, int]:
    """Return the multiply-accumulates of every layer in one call with one sample, in `named_modules()` order.

    At the size that the configuration names, or that of the example inputs; attention's own products are none of a
    layer. Arguments and errors are those of `trace_graph`.
    """
    trace = analyse(denoiser, example_inputs=example_inputs).trace
    return {spec.name: trace.macs.get(spec.name, 0) for spec in trace.specs}
