"""The inventory of a denoiser: every quantizable layer, where it stands, and how many quantizers it takes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from quantdm.denoisers.analysis import Analysis, analyse
from quantdm.denoisers.names import op_type_of, stage_of, weights_below
from quantdm.denoisers.weights import WeightKind


@dataclass(frozen=True)
class LayerRecord:
    """One Linear or Conv of a denoiser.

    `shape` is that of the weight, [C_out, C_in/groups, *kernel]; `split` the input channel where a concatenated long
    skip begins (two quantizers then); `index` the topological position among the layers; `block` a block's name.
    """

    name: str
    kind: WeightKind
    op_type: str
    block: str
    num_weights: int
    shape: tuple[int, ...]
    quantizers: Literal[1, 2]
    split: int | None
    index: int
    stage: str


def list_layers(denoiser: nn.Module, *, example_inputs: Mapping[str, Any] | None = None) -> tuple[LayerRecord, ...]:
    """Return every Linear/Conv1d/2d/3d of a denoiser, in `named_modules()` order.

    Works on real, meta and quantized denoisers alike: a copy made from class and configuration is traced on the meta
    device (see `trace_graph`, also for the arguments and errors). Cached.
    """
    return layers_of(analyse(denoiser, example_inputs=example_inputs))


def layers_of(analysis: Analysis) -> tuple[LayerRecord, ...]:
    """Return the layers that a trace saw, in `named_modules()` order."""
    specs, seams, graph = analysis.trace.specs, analysis.trace.seams, analysis.graph
    below = weights_below(s.name for s in specs)
    position = {n.layer: i for i, n in enumerate(n for n in graph.nodes if n.layer is not None)}
    block_of = {layer: block.name for block in graph.blocks for layer in block.layers}
    return tuple(
        LayerRecord(
            name=s.name,
            kind=s.kind,
            op_type=op_type_of(s.name, below),
            block=block_of[s.name],
            num_weights=math.prod(s.shape),
            shape=s.shape,
            quantizers=2 if s.name in seams else 1,
            split=seams.get(s.name),
            index=position[s.name],
            stage=stage_of(s.name),
        )
        for s in specs
    )
