"""One-layer noise errors of every layer and option at once, from backward passes over recorded calls."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantdm.denoisers.calls import Call
from quantdm.denoisers.propagation import propagated_errors
from quantdm.files import digest
from quantdm.pipelines.subject import Subject
from quantdm.quantizers.branches import fits_rank
from quantdm.recipe.joint import joint_prefix
from quantdm.runs.bank import WeightBank
from quantdm.schemes import Scheme


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
    gradient reaches is missing; a denoiser that has no backward pass, or no memory for it, is named under "without",
    with the reason.
    """
    schemes = tuple(map(Scheme.parse, asked.options))
    errors: dict[str, dict[str, float]] = {}
    without: dict[str, str] = {}
    draws = []
    for number, (part, own) in enumerate(calls.items()):
        try:
            found = _of_part(subject, bank, part, joint_prefix(part, number), own, schemes, asked.seed)
        except (RuntimeError, NotImplementedError) as error:
            without[part] = str(error).strip().partition("\n")[0]
            continue
        errors |= found
        draws.append(sum(len(call.output) for call in own))
    return {"errors": errors, "draws": min(draws, default=0), "without": without}


def _of_part(
    subject: Subject, bank: WeightBank, part: str, prefix: str, calls: Sequence[Call], schemes: Sequence[Scheme],
    seed: int,
) -> dict[str, dict[str, float]]:  # fmt: skip
    layers = {layer.name: [s for s in schemes if fits_rank(layer.shape, s)] for layer in subject.part_layers[part]}

    def weight_errors(name: str) -> Iterator[Tensor]:
        weight = subject.weights.get_parameter(f"{prefix}{name}.weight").detach().float()
        for scheme in layers[name]:
            yield bank.dense(prefix + name, scheme, torch.float32, weight.device) - weight

    sums: dict[str, Counter[str]] = {}
    for place, call in enumerate(calls):
        found = propagated_errors(
            subject.denoisers[part], call, list(layers), weight_errors, seed=seed * len(calls) + place
        )
        for name, values in found.items():
            labels = [scheme.label for scheme in layers[name]]
            sums.setdefault(prefix + name, Counter()).update(dict(zip(labels, values, strict=True)))
    return {name: {label: total / len(calls) for label, total in own.items()} for name, own in sums.items()}
