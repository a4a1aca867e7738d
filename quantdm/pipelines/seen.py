"""What was seen of a pipeline, as a record: enough to tell whether another one is the same, and where it differs."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from pydantic import BaseModel, ConfigDict
from torch import nn

from quantdm.pipelines.fingerprint import dtype_of, fingerprint_part, settings_of
from quantdm.pipelines.parts import find_denoisers
from quantdm.pipelines.sketch import sketch_of


class Part(BaseModel):
    """One component: its class, the hash of its weights or settings, a network's dtype, a scheduler's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    class_name: str
    fingerprint: str
    dtype: str | None = None
    settings: dict[str, Any] | None = None
    sketch: tuple[str, ...] = ()  # of a denoiser's weights, in every dtype; () in runs that are older


class Seen(BaseModel):
    """What was seen of a pipeline."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pipeline: str
    denoisers: tuple[str, ...]
    parts: dict[str, Part]
    device: str
    example_inputs: dict[str, dict[str, Any]] = {}

    @property
    def weights(self) -> dict[str, tuple[str, ...]]:
        """The sketch of every denoiser's weights, as a recipe keeps them (see sketch.py)."""
        return {name: self.parts[name].sketch for name in self.denoisers if self.parts[name].sketch}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of every network, as `from_pretrained` takes it."""
        found = {name: getattr(torch, part.dtype) for name, part in self.parts.items() if part.dtype is not None}
        return {**found, "default": torch.float32}


def see(pipe: DiffusionPipeline, example_inputs: Mapping[str, dict[str, Any]]) -> Seen:
    """Return the record of a pipeline: every component that is there."""
    parts, denoisers = {}, find_denoisers(pipe)
    for name, part in pipe.components.items():
        if part is None:
            continue
        is_network = isinstance(part, nn.Module)
        parts[name] = Part(
            class_name=type(part).__name__,
            fingerprint=fingerprint_part(part),
            dtype=dtype_of(part) if is_network else None,
            settings=settings_of(part) if "scheduler" in name else None,
            sketch=sketch_of(part) if name in denoisers else (),
        )
    return Seen(
        pipeline=type(pipe).__name__,
        denoisers=tuple(denoisers),
        parts=parts,
        device=torch.device(pipe.device).type,
        example_inputs=dict(example_inputs),
    )


def differences(first: Seen, second: Seen) -> list[str]:
    """Return where two pipelines differ, in words a user understands; the device makes no difference."""
    found = []
    if first.pipeline != second.pipeline:
        found.append(f"pipeline is {first.pipeline}, now {second.pipeline}")
    for name in dict.fromkeys([*first.parts, *second.parts]):
        a, b = first.parts.get(name), second.parts.get(name)
        if a is None or b is None:
            found.append(f"{name} is {'absent' if a is None else a.class_name}, now {b.class_name if b else 'absent'}")
        elif a.class_name != b.class_name:
            found.append(f"{name} is {a.class_name}, now {b.class_name}")
        elif a.settings is not None and a.settings != b.settings:
            found += _settings(name, a.settings, b.settings or {})
        elif a.fingerprint != b.fingerprint:
            found.append(f"{name} has other weights" if a.dtype else f"{name} has other settings")
        elif a.dtype != b.dtype:
            found.append(f"{name} is in {a.dtype}, now {b.dtype}")
    if first.example_inputs != second.example_inputs:
        found.append("the example inputs differ")
    return found


def _settings(name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    keys = [key for key in dict.fromkeys([*first, *second]) if first.get(key) != second.get(key)]
    return [f"{name}.{key} is {first.get(key)!r:.40}, now {second.get(key)!r:.40}" for key in keys]
