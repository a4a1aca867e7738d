"""How long a call of a denoiser takes in full precision, quantized by quantdm, and in the layers of peers.

All on the same calls, one after the other in a few minutes and by one thread, so that figures of one record compare.
The load of the machine is recorded beside them: figures of a busy machine are worth little. Started by
compare_peers.py.
"""

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantdm import apply_recipe, get_denoiser, load_pipeline, load_protocol
from quantdm.denoisers.calls import Call
from quantdm.files import save_tensors
from quantdm.machine import load
from quantdm.metrics.timing import time_calls, time_residencies
from quantdm.pipelines.generate import calibration_calls
from quantdm.recipe import Recipe
from quantdm.schemes import TABLE_SCHEME, Scheme

IMAGES, STEPS = 8, 5
Labels = Mapping[str, str | None]


def step_times(model: str, layouts: Mapping[str, Labels], python: Path, folder: Path) -> dict[str, Any]:
    """Return milliseconds per call: of full precision, of rows of quantdm per residency, of peers, and the load.

    Args:
        model: an embedded pipeline.
        layouts: row -> layer -> label. Codes are made without calibration: what is stored, and how it is decoded, does
            not depend on it.
        python: of the peers' environment.
        folder: holds the bf16 denoiser under the model's name.
    """
    before, pipe = load(), load_pipeline(model, torch_dtype=torch.bfloat16)
    calls = calibration_calls(pipe, load_protocol(model), range(IMAGES), steps=STEPS)
    found: dict[str, Any] = {"images": IMAGES, "calls": len(calls), "threads": torch.get_num_threads()}
    found["full precision"] = {"dense": time_calls(get_denoiser(pipe), calls, "original").ms}
    for name, labels in layouts.items():
        found[name] = residencies(model, labels, calls)
        print(f"{name}: {found[name]} ms", flush=True)
    found["peers"] = peers_times(python, folder / model, calls)
    return found | {"load": [round(before, 2), round(load(), 2)]}


def residencies(model: str, labels: Labels, calls: Sequence[Call]) -> dict[str, float]:
    pipe = load_pipeline(model, torch_dtype=torch.bfloat16)
    plain = {name: None if label is None else uncalibrated(label) for name, label in labels.items()}
    apply_recipe(pipe, Recipe(model=model, layers=plain, embeddings=TABLE_SCHEME.label), insist=True)
    rows = time_residencies(get_denoiser(pipe), calls, ("dense", "packed"))
    return {row.residency: row.ms for row in rows}


def uncalibrated(label: str) -> str:
    """Return the label of the same codes, tables and scales, made without a calibration."""
    return Scheme.parse(label).model_copy(update={"calibration": None}).label


def peers_times(python: Path, denoiser: Path, calls: Sequence[Call]) -> dict[str, Any]:
    """Return what eval/time_peers.py says of the peers, in a process of theirs."""
    script = Path(__file__).with_name("time_peers.py")
    with tempfile.TemporaryDirectory() as temporary:
        inputs, out = Path(temporary, "calls.safetensors"), Path(temporary, "times.json")
        save_calls(inputs, calls)
        subprocess.run([str(python), str(script), str(denoiser), str(inputs), str(out)], check=True)
        return json.loads(out.read_text())


def save_calls(path: Path, calls: Sequence[Call]) -> None:
    """Write the inputs of calls: tensors by name, what is none in the header."""
    tensors: dict[str, torch.Tensor] = {}
    plain: list[dict[str, Any]] = []
    for i, call in enumerate(calls):
        args, kwargs = dict(enumerate(call.args)), call.kwargs
        for name, value in {**args, **kwargs}.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{i}.{name}"] = value.clone().contiguous()
        others = {name: None if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
        plain.append({"args": [None if isinstance(v, torch.Tensor) else v for v in args.values()], "kwargs": others})
    save_tensors(path, tensors, {"calls": plain})
