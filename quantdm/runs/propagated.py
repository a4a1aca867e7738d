"""One-layer noise errors of every layer and option at once, from backward passes over recorded calls."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantdm.bank.weight_bank import WeightBank
from quantdm.denoisers.calls import Call
from quantdm.denoisers.propagation import propagated_errors
from quantdm.errors import QuantDMError
from quantdm.files import digest
from quantdm.machine import give_back_freed
from quantdm.pipelines.sizes import is_out_of_memory
from quantdm.pipelines.subject import Subject
from quantdm.quantizers.branches import fits_rank
from quantdm.recipe.joint import joint_prefix
from quantdm.schemes import Scheme
from quantdm.tuning.train import take_rows

# What a network raises that cannot be gone back through, or does other things where gradients are wanted.
NO_WAY_BACK = (RuntimeError, MemoryError, ValueError, TypeError)
OfCall = Callable[[Call, str], dict[str, list[float]]]


@dataclass(frozen=True)
class Pass:
    """A backward pass over every recorded call: the seed of its signs, and the labels of the schemes asked for."""

    seed: int
    options: tuple[str, ...]

    @property
    def key(self) -> str:
        """Everything that determines the errors, except the run's own settings."""
        return digest("pass", self.seed, self.options)


def propagated(subject: Subject, bank: WeightBank, calls: Mapping[str, Sequence[Call]], asked: Pass) -> dict[str, Any]:
    """Return estimates of the one-layer noise errors: "errors", layer -> label -> relative squared error.

    "draws" is over how many independent ones they are averages, in the denoiser that has fewest. A layer that no
    gradient reaches is missing, and an error that is not finite; a denoiser that has no backward pass is named under
    "without", with the reason. Where memory runs out, the samples of a call are taken in halves.
    """
    schemes = tuple(map(Scheme.parse, asked.options))
    errors: dict[str, dict[str, float]] = {}
    without: dict[str, str] = {}
    draws = []
    for number, (part, own) in enumerate(calls.items()):
        try:
            found = _of_part(subject, bank, part, joint_prefix(part, number), own, schemes, asked.seed)
        except NO_WAY_BACK as error:
            if isinstance(error, QuantDMError):
                raise
            without[part] = str(error).strip().partition("\n")[0] or type(error).__name__
            continue
        if found:
            errors |= found
            draws.append(sum(len(call.output) for call in own))
        give_back_freed()
    return {"errors": errors, "draws": min(draws, default=0), "without": without}


def _of_part(
    subject: Subject, bank: WeightBank, part: str, prefix: str, calls: Sequence[Call], schemes: Sequence[Scheme],
    seed: int,
) -> dict[str, dict[str, float]]:  # fmt: skip
    layers = {layer.name: [s for s in schemes if fits_rank(layer.shape, s)] for layer in subject.part_layers[part]}
    names = [name for name, own in layers.items() if own]

    def weight_errors(name: str) -> Iterable[Tensor]:
        weight = subject.weights.get_parameter(f"{prefix}{name}.weight").detach().float()
        return (bank.dense(prefix + name, scheme, torch.float32, weight.device) - weight for scheme in layers[name])

    def of_call(call: Call, place: str) -> dict[str, list[float]]:
        signs = int(digest("signs", seed, place)[:12], 16)
        return propagated_errors(subject.denoisers[part], call, names, weight_errors, seed=signs)

    sums: dict[str, Counter[str]] = {}
    for number, call in enumerate(calls):
        for name, values in _halved(of_call, call, str(number)).items():
            labels = [scheme.label for scheme in layers[name]]
            sums.setdefault(prefix + name, Counter()).update(dict(zip(labels, values, strict=True)))
    return {
        name: {label: total / len(calls) for label, total in own.items() if math.isfinite(total)}
        for name, own in sums.items()
    }


def _halved(of_call: OfCall, call: Call, place: str) -> dict[str, list[float]]:
    """Return the errors of a call; where memory runs out, those of both halves of its samples put together."""
    count = len(call.output)
    try:
        return of_call(call, place)
    except (RuntimeError, MemoryError) as error:
        if count == 1 or not is_out_of_memory(error):
            raise
    found = [(_halved(of_call, half, f"{place}.{n}"), _power(half)) for n, half in enumerate(_halves(call))]
    whole = _power(call)
    return {
        name: np.sum([np.array(own[name]) * power / whole for own, power in found], axis=0).tolist()
        for name in found[0][0]
        if name in found[1][0]
    }


def _halves(call: Call) -> Iterator[Call]:
    count = len(call.output)
    for rows in torch.arange(count, device=call.output.device).tensor_split(2):
        args, kwargs = take_rows((call.args, call.kwargs), rows, count)
        yield Call(args, kwargs, call.output[rows])


def _power(call: Call) -> float:
    return call.output.double().square().sum().item()
