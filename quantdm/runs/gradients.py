"""Gradient sensitivities: what ModelOpt's search goes by, as a baseline beside the one-layer noise errors."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from quantdm.denoisers.calls import Call, first_tensor
from quantdm.files import digest, read_json, write_json
from quantdm.progress import bar
from quantdm.quantizers.branches import fits_rank
from quantdm.runs.evaluator import Evaluator
from quantdm.runs.run import Run
from quantdm.schemes import ORIGINAL
from quantdm.surrogates import SearchSpace
from quantdm.tuning.train import take_rows

_log = logging.getLogger("quantdm")

GRADIENT_FILE, GRADIENT_VERSION = "gradients.json", 1
ROWS = 4  # samples of a pool: a backward pass keeps the activations of all of them


def measure_gradients(run: Run, evaluator: Evaluator, space: SearchSpace) -> NDArray[np.float64] | None:
    """Return (g·ΔW)² summed over pools for every layer and option, [L, O], and write gradients.json.

    None, with a line in the log: there is no room for a backward pass, or an operation that has none. A search goes on
    without this baseline.

    A pool is ROWS samples of one recorded call of a denoiser on a full-precision trajectory, g the gradient of the
    product of its output with random signs, relative to the size of the output: in expectation over the signs the sum
    is the output's relative error when only this layer takes this option, to first order, at one backward pass a pool
    for all layers and options (nvidia-modelopt's auto_quantize has the gradient of a loss in place of the signs;
    Hutchinson, 1990).
    A record of the same space is read, not measured again.
    """
    known = load_gradients(run, space)
    if known is not None:
        return known
    try:
        scores = _measured(evaluator, space)
    except (MemoryError, RuntimeError) as error:  # out of memory on an accelerator is a RuntimeError
        _log.warning("gradient sensitivities are left out as a baseline: %.200s", error)
        return None
    if not np.isfinite(scores).all():
        _log.warning("gradient sensitivities are left out as a baseline: some are not finite")
        return None
    record = {"version": GRADIENT_VERSION, "space": _key(space), "scores": scores.tolist()}
    write_json(run.path(GRADIENT_FILE), record)
    return scores


def _measured(evaluator: Evaluator, space: SearchSpace) -> NDArray[np.float64]:
    recorded, scores = evaluator.recorded_calls(), np.zeros(space.bits.shape)
    parameters = {name: evaluator.subject.weights.get_parameter(f"{name}.weight") for name in space.layer_names}
    with bar(sum(map(len, recorded.values())), "gradients: one backward pass a pool") as progress:
        for part, calls in recorded.items():
            own = {n: p for n, p in parameters.items() if evaluator.subject.part_of(n) == part}
            for number, call in enumerate(calls):
                gradients = _gradients(evaluator.subject.denoisers[part], call, own, seed=number)
                for name, gradient in gradients.items():
                    scores[space.layer_index[name]] += _products(evaluator, space, name, gradient) / len(calls)
                progress.update()
    return scores


def load_gradients(run: Run, space: SearchSpace) -> NDArray[np.float64] | None:
    """Return what `measure_gradients` recorded for this space; None: nothing."""
    if not run.path(GRADIENT_FILE).is_file():
        return None
    record = read_json(run.path(GRADIENT_FILE), version=GRADIENT_VERSION)
    return np.array(record["scores"]) if record["space"] == _key(space) else None


def _key(space: SearchSpace) -> str:
    return digest(space.layer_names, space.labels)


@torch.enable_grad()
def _gradients(
    denoiser: torch.nn.Module, call: Call, parameters: Mapping[str, torch.nn.Parameter], *, seed: int
) -> dict[str, torch.Tensor]:
    """Return the gradient of <output, signs> / |output| for every parameter that the call uses."""
    before: Sequence[bool] = [parameter.requires_grad for parameter in parameters.values()]
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        count = len(call.output)
        rows = torch.arange(min(ROWS, count), device=call.output.device)
        args, kwargs = take_rows((call.args, call.kwargs), rows, count)
        output = first_tensor(denoiser(*args, **kwargs)).float()
        signs = torch.randint(0, 2, output.shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
        size = output.detach().norm().clamp_min(torch.finfo(torch.float32).tiny)
        found = torch.autograd.grad(
            (output * signs.to(output.device)).sum() / size, [*parameters.values()], allow_unused=True
        )
    finally:
        for parameter, wanted in zip(parameters.values(), before, strict=True):
            parameter.requires_grad_(wanted)
    return {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}


def _products(evaluator: Evaluator, space: SearchSpace, name: str, gradient: torch.Tensor) -> NDArray[np.float64]:
    """Return (g·ΔW)² of one layer under every option, [O]."""
    weight = evaluator.subject.weights.get_parameter(f"{name}.weight").detach()
    found = np.zeros(len(space.options))
    for index, option in enumerate(space.options):
        if option != ORIGINAL and fits_rank(weight.shape, option):
            difference = evaluator.bank.dense(name, option, weight.dtype, weight.device) - weight
            found[index] = float((difference.float() * gradient.float()).sum(dtype=torch.float64)) ** 2
    worse = [not fits_rank(weight.shape, option) for option in space.options]
    return np.where(worse, found.max(), found)
