"""The subject: a pipeline as it was looked at, once, at the door. Every stage takes what was seen."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from quantdm.denoisers.analysis import analyse
from quantdm.denoisers.calls import Recording, record_calls
from quantdm.denoisers.ensemble import join_graphs, join_layers, join_tables, join_weights
from quantdm.denoisers.given_inputs import describe_inputs
from quantdm.denoisers.graph import Graph
from quantdm.denoisers.inventory import LayerRecord, layers_of
from quantdm.denoisers.tables import TableRecord, list_tables
from quantdm.errors import QuantDMError
from quantdm.machine import best_device
from quantdm.pipelines.casting import in_dtype
from quantdm.pipelines.known import pipeline_path
from quantdm.pipelines.loading import load_pipeline, model_name
from quantdm.pipelines.parts import DENOISER_NAMES, find_denoisers, inputs_by_part
from quantdm.pipelines.seen import Seen, differences, see
from quantdm.pipelines.stored import stored_variant, weight_files
from quantdm.pipelines.tensor_files import floats_are
from quantdm.recipe.joint import split_name

Inputs = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Subject:
    """A live pipeline with everything that was seen of it.

    Args:
        pipe: the pipeline.
        name: what it is called: an embedded name, a directory, a hub id; "" if it was built in memory.
        location: where the same pipeline can be opened again (None: nowhere, it was changed after loading).
        denoisers: component name -> network, the main one first.
        part_layers: component name -> its layers, under their own names.
        part_graphs: component name -> its traced data flow.
        seen: the record: classes, fingerprints, dtypes and settings of every part, device, example inputs.
        dtype_is_free: whether images may be generated in the dtype that is fast here (it was opened by name), or must
            be in the pipeline's own.
    """

    pipe: DiffusionPipeline
    name: str
    location: str | None
    denoisers: dict[str, nn.Module]
    part_layers: dict[str, tuple[LayerRecord, ...]]
    part_graphs: dict[str, Graph]
    seen: Seen
    dtype_is_free: bool = False

    @property
    def denoiser(self) -> nn.Module:
        """The main denoiser."""
        return next(iter(self.denoisers.values()))

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names of the denoisers, the main one first."""
        return tuple(self.denoisers)

    @cached_property
    def layers(self) -> tuple[LayerRecord, ...]:
        """The layers of all denoisers; those of further ones are called `PART:layer`."""
        return join_layers(self.part_layers)

    @cached_property
    def tables(self) -> tuple[TableRecord, ...]:
        """The embedding tables of all denoisers, under joint names."""
        return join_tables({name: list_tables(module) for name, module in self.denoisers.items()})

    @cached_property
    def graph(self) -> Graph:
        """The data flow of all denoisers."""
        return join_graphs(self.part_graphs)

    @cached_property
    def weights(self) -> nn.Module:
        """A module that holds every weight under its joint name."""
        return join_weights(self.denoisers)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the main denoiser."""
        return getattr(torch, self.seen.parts[self.part_names[0]].dtype or "float32")

    @property
    def device(self) -> torch.device:
        """Where the main denoiser is."""
        return next(self.denoiser.parameters()).device

    def part_of(self, layer_name: str) -> str:
        """Return the component that a layer belongs to."""
        return split_name(layer_name, self.part_names)[0]

    def in_dtype(self, dtype: torch.dtype) -> DiffusionPipeline:
        """Return the pipeline itself if it has this dtype, else a copy of it that has."""
        return self.pipe if dtype == self.dtype else in_dtype(self.pipe, dtype)

    def dense_parts(self) -> tuple[str, ...]:
        """Return the networks of the pipeline that a search leaves as they are."""
        parts = self.pipe.components.items()
        return tuple(name for name, part in parts if isinstance(part, nn.Module) and name not in self.denoisers)

    @contextmanager
    def recording(self, pipe: DiffusionPipeline, steps: Mapping[str, Sequence[int]] | None = None) -> Iterator[dict]:
        """Record the calls of every denoiser of `pipe` (the subject's, or its copy): component name -> `Recording`."""
        with ExitStack() as stack:
            found: dict[str, Recording] = {}
            for name, module in find_denoisers(pipe).items():
                wanted = None if steps is None else steps[name]
                found[name] = stack.enter_context(record_calls(module, wanted))
            yield found


def look_at(
    pipe: DiffusionPipeline | str | Path,
    *,
    example_inputs: Inputs | None = None,
    device: str | torch.device | None = None,
    location: str | None = None,
    dtype: str | None = None,
) -> Subject:
    """Look at a pipeline: find its denoisers, trace them, take the fingerprint of every part.

    Args:
        pipe: a live pipeline, which is taken as it is, or the name of one, which is opened in float32.
        example_inputs: keyword arguments of one call of the denoiser, where they cannot be inferred from its class and
            configuration; of several denoisers: component name -> keyword arguments. See `capture_inputs`.
        device: where a named pipeline is put (None: CUDA if there is any).
        location: where a live pipeline is known to lie; None: the place it says is opened again and compared.
        dtype: in which a named pipeline is opened if its denoisers are stored in it, which halves the memory of what is
            stored in 16 bits (None, or stored otherwise: float32).

    Raises:
        QuantDMError: unknown name, no denoiser, or one that cannot be traced.
    """
    named = isinstance(pipe, (str, Path))
    live = (
        load_pipeline(pipe, device=device or best_device(), torch_dtype=_opened_in(pipe, dtype))
        if isinstance(pipe, (str, Path))
        else pipe
    )
    denoisers = find_denoisers(live)
    inputs = {
        name: given
        for name, module in denoisers.items()
        for owner, given in inputs_by_part(live, example_inputs)
        if owner is module
    }
    found = {name: analyse(module, example_inputs=inputs.get(name)) for name, module in denoisers.items()}
    seen = see(live, {name: describe_inputs(given) for name, given in inputs.items()})
    name = str(pipe) if isinstance(pipe, (str, Path)) else model_name(live)
    return Subject(
        pipe=live,
        name=name,
        location=location or (_absolute(name) if named or _opens_the_same(name, seen) else None),
        denoisers=denoisers,
        part_layers={part: layers_of(analysis) for part, analysis in found.items()},
        part_graphs={part: analysis.graph for part, analysis in found.items()},
        seen=seen,
        dtype_is_free=named,
    )


def _opened_in(name: str | Path, dtype: str | None) -> torch.dtype:
    """Return the dtype in which a pipeline is opened when images are to be generated in `dtype`."""
    folder, wanted = Path(pipeline_path(name)), getattr(torch, dtype or "float32")
    files = [[*weight_files(folder / part, stored_variant(folder))] for part in DENOISER_NAMES]
    stored = [group for group in files if group]
    return wanted if stored and all(floats_are(group, wanted) for group in stored) else torch.float32


def reopen(
    location: str, name: str, seen: Seen, *, example_inputs: Inputs | None = None, device: str | None = None
) -> Subject:
    """Open a pipeline again and look at it: the same dtypes, on a device (None: of the same kind), called `name`.

    Raises:
        QuantDMError: it cannot be opened, or it is no longer what was seen; the differences are named.
    """
    live = load_pipeline(location, torch_dtype=seen.dtypes, device=device or seen.device)
    subject = look_at(live, example_inputs=example_inputs, location=location)
    changed = differences(seen, subject.seen)
    if changed:
        raise QuantDMError(
            f"pipeline {location} is not what it was when the run started: {'; '.join(changed[:3])}; "
            "put it back, or start another run"
        )
    return replace(subject, name=name)


def _opens_the_same(name: str, seen: Seen) -> bool:
    """Say whether opening that name gives the pipeline that was seen, with no change since it was loaded."""
    if not name:
        return False
    try:
        again = load_pipeline(name, torch_dtype=seen.dtypes)
    except ValueError:  # deleted, or a hub that cannot be reached: the live pipeline is all there is
        return False
    return not differences(seen, see(again, seen.example_inputs))


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).is_dir() else name
