"""Calibrate a pipeline: run it in full precision and give the second moments of its layers' inputs."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from quantdm.activations.moments import LazyMoments, gather_moments
from quantdm.denoisers.calls import record_calls
from quantdm.pipelines.generate import generate
from quantdm.pipelines.loading import DiffusionPipeline
from quantdm.pipelines.parts import find_denoisers
from quantdm.pipelines.protocol import Protocol, load_protocol
from quantdm.pipelines.tried import check_called
from quantdm.quantizers import Moments
from quantdm.recipe import CalibrationSpec


def protocol_of(spec: CalibrationSpec) -> Protocol:
    """Return the protocol that a recipe was calibrated on.

    Raises:
        QuantDMError: there is none of that name, or it is none.
    """
    return load_protocol(spec.protocol) if isinstance(spec.protocol, str) else Protocol(**spec.protocol)


def calibrate(
    pipe: DiffusionPipeline,
    spec: CalibrationSpec,
    layer_names: Mapping[str, Sequence[str]],
    *,
    folder: str | Path | None = None,
    batch_size: int | Literal["auto"] = "auto",
) -> dict[str, Mapping[str, Moments]]:
    """Return the moments of layers of the denoisers: component name -> layer name -> `Moments`.

    Args:
        pipe: in full precision; it is left as it was.
        spec: which images are made.
        layer_names: component name -> its layers.
        folder: where moments are kept, one file per layer (see `gather_moments`). None: they are gathered group by
            group as they are asked for, so that memory holds one group.
        batch_size: images at once at most ("auto": found from memory).

    Raises:
        QuantDMError: the pipeline cannot make these images, or they never run a layer.
    """
    seeds = range(spec.first_seed, spec.first_seed + spec.images)
    protocol, denoisers = protocol_of(spec), find_denoisers(pipe)
    with ExitStack() as stack:
        recorded = {name: stack.enter_context(record_calls(denoisers[name])) for name in layer_names}
        generate(pipe, protocol, seeds, steps=spec.steps, batch_size=batch_size)
    check_called({name: recording.calls for name, recording in recorded.items()}, spec.steps or protocol.steps)
    return {
        part: LazyMoments(denoisers[part], recorded[part].calls, names)
        if folder is None
        else gather_moments(denoisers[part], recorded[part].calls, names, folder=folder)
        for part, names in layer_names.items()
    }
