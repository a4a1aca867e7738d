"""How fast a quantized denoiser runs here in every residency, in how much memory, and how near to its simulation."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from quantdm.denoisers.calls import Call, replay
from quantdm.metrics.distance import relative_error
from quantdm.modules import RESIDENCIES, Residency, packed_layers, set_residency

ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """One row of a table.

    `ms` per call of the denoiser, the best of the rounds; `nbytes` of its weights in memory; `distance`, the relative
    one |y - y_sim| / |y_sim| to the output of the simulation, the largest of the calls (None where nothing is rounded).
    """

    residency: str
    ms: float
    nbytes: int
    distance: float | None


def time_residencies(
    denoiser: nn.Module,
    calls: Sequence[Call],
    residencies: Sequence[Residency] = RESIDENCIES,
    *,
    rounds: int = ROUNDS,
    progress: Callable[[], object] = lambda: None,
) -> list[Timing]:
    """Return one row per residency; the denoiser is packed afterwards.

    Residencies take turns: what else the machine does meanwhile, and how warm it is, meets all of them.

    Args:
        denoiser: with packed layers, its activations set as they are wanted.
        calls: what it is called with, e.g. those of one trajectory.
        residencies: in which it runs.
        rounds: timed runs over all calls; the first of each comes after one that warms up, later ones after one call.
        progress: called as often as there are residencies.
    """
    set_residency(denoiser, "dense")
    expected = replay(denoiser, calls)
    best, nbytes, distances = dict.fromkeys(residencies, float("inf")), {}, {}
    for number in range(rounds):
        for residency in residencies:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # layers that take the next best form count as they are
                set_residency(denoiser, residency)
            found = replay(denoiser, calls if number == 0 else calls[:1])
            if number == 0:
                distances[residency] = _distance(found, expected)
            best[residency] = min(best[residency], _seconds(denoiser, calls))
            nbytes[residency] = weight_bytes(denoiser)
            if number == rounds - 1:
                progress()
    set_residency(denoiser, "packed")
    return [Timing(each, best[each] * 1e3, nbytes[each], distances[each]) for each in residencies]


def time_calls(denoiser: nn.Module, calls: Sequence[Call], name: str, *, rounds: int = ROUNDS) -> Timing:
    """Return the row of a denoiser as it is."""
    replay(denoiser, calls)
    best = min(_seconds(denoiser, calls) for _ in range(rounds))
    return Timing(name, best * 1e3, weight_bytes(denoiser), None)


def _seconds(denoiser: nn.Module, calls: Sequence[Call]) -> float:
    """Return the seconds per call."""
    start = time.perf_counter()
    last = replay(denoiser, calls)[-1]
    if last.device.type != "cpu":
        torch.accelerator.synchronize(last.device)
    return (time.perf_counter() - start) / len(calls)


def _distance(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    return max(relative_error(y, e) for y, e in zip(found, expected, strict=True)) ** 0.5


def weight_bytes(denoiser: nn.Module) -> int:
    """Return the bytes of all parameters in memory, packed layers in all the forms that they hold."""
    layers = packed_layers(denoiser)
    packed = {id(layer.packed) for layer in layers.values()}
    rest = sum(p.nbytes for p in denoiser.parameters() if id(p) not in packed)
    return rest + sum(layer.held_bytes for layer in layers.values())
