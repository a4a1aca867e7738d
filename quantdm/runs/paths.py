"""Which path carries the damage of a recipe through the denoiser: measured, with full-precision tensors on edges."""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import nn

from quantdm.denoisers.calls import Call
from quantdm.denoisers.flow import Flow, record_flow
from quantdm.errors import QuantDMError
from quantdm.files import digest, read_json, write_json
from quantdm.metrics import relative_error
from quantdm.progress import bar
from quantdm.runs.evaluator import Evaluator
from quantdm.runs.explain import is_current
from quantdm.runs.run import Run
from quantdm.schemes import QuantConfig
from quantdm.surrogates.smallest_set import SHARE, SmallestSet, smallest_set

PATHS_FILE = "paths.json"
PATHS_VERSION = 1


def carrying_edges(denoiser: nn.Module, flows: list[Flow], *, share: float = SHARE) -> SmallestSet:
    """Find the fewest edges of the data flow that carry a share of a denoiser's damage.

    The denoiser has quantized weights, `flows` were recorded in full precision. Damage is the relative error of the
    output, mean over the calls; an edge is restored when it carries the full-precision tensor of the same input. An
    edge is needed if restoring it undoes damage, and the set is enough if the damage stays with all others restored.
    """
    count = len(flows[0].edges)

    def damage(carried: Collection[int]) -> float:
        return float(np.mean([relative_error(f.run(denoiser, carried), f.call.output) for f in flows]))

    with bar(count + 2, "paths: one edge a time") as progress:
        return smallest_set(count, damage, share=share, tick=progress.update)


def record_flows(denoiser: nn.Module, calls: list[Call]) -> list[Flow]:
    """Watch calls in full precision.

    Raises:
        QuantDMError: two calls take different ways.
    """
    flows = [record_flow(denoiser, call) for call in calls]
    if any(flow.edges != flows[0].edges for flow in flows):
        raise QuantDMError("paths: the data flow of this denoiser changes from call to call; its edges have no damage")
    return flows


def find_paths(
    run: Run, labels: Mapping[str, str | None], name: str, *, calls: int = 2, share: float = SHARE
) -> dict[str, Any]:
    """Write paths.json: which edges carry the damage of a configuration; keep the record of the same question.

    Args:
        run: its pipeline is opened, its bank holds the weights.
        labels: layer -> scheme, None where it stays as it is.
        name: what the configuration is called.
        calls: of the one-layer noise errors' calls, from the middle of trajectories.
        share: of the damage to explain.

    Raises:
        QuantDMError: several denoisers, or a denoiser whose way depends on values.
    """
    path = run.path(PATHS_FILE)
    inputs = digest(run.settings.model_dump(mode="json"), dict(labels), name, calls, share)
    if is_current(path, inputs):
        return read_json(path, version=PATHS_VERSION)
    subject = run.open_subject()
    if len(subject.denoisers) > 1:
        raise QuantDMError(
            f"paths: this pipeline has {len(subject.denoisers)} denoisers ({', '.join(subject.denoisers)}), which "
            "share no data flow; expected one"
        )
    evaluator = Evaluator(run, subject)
    (recorded,) = evaluator.recorded_calls().values()
    middle = (len(recorded) - calls + 1) // 2
    flows = record_flows(subject.denoiser, recorded[max(middle, 0) :][:calls])
    if [node.name for node in flows[0].graph.nodes] != [node.name for node in subject.graph.nodes]:
        raise QuantDMError("paths: the data flow of a real call is not the traced one; the edges have no place in it")
    config = QuantConfig.from_labels(dict(labels))
    with evaluator.bank.applied(subject.weights, config, room=math.inf):  # decoding would look like operations of it
        found = carrying_edges(subject.denoiser, flows, share=share)
    edges = [{**asdict(edge), "undoes": found.single[index]} for index, edge in enumerate(flows[0].edges)]
    record = {
        "version": PATHS_VERSION,
        "inputs": inputs,
        "configuration": name,
        "labels": dict(labels),
        "calls": len(flows),
        "images": len(flows[0].call.output),
        "share": share,
        "edges": edges,
        "carrying": list(found.members),
        "undone": found.undone,
        "missing": found.missing,
    }
    write_json(path, record)
    return record
