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

    Args:
        denoiser: with packed layers, its activations set as they are wanted.
        calls: what it is called with, e.g. those of one trajectory.
        residencies: in which it runs.
        rounds: timed runs over all calls, after one that warms up.
        progress: called after every residency.
    """
    set_residency(denoiser, "dense")
    expected = replay(denoiser, calls)
    rows = []
    for residency in residencies:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # layers that take the next best form count as they are
            set_residency(denoiser, residency)
        rows.append(time_calls(denoiser, calls, residency, rounds=rounds, expected=expected))
        progress()
    set_residency(denoiser, "packed")
    return rows


def time_calls(
    denoiser: nn.Module,
    calls: Sequence[Call],
    name: str,
    *,
    rounds: int = ROUNDS,
    expected: Sequence[torch.Tensor] | None = None,
) -> Timing:
    """Return the row of a denoiser as it is."""
    found, best = replay(denoiser, calls), float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        last = replay(denoiser, calls)[-1]
        if last.device.type != "cpu":
            torch.accelerator.synchronize(last.device)
        best = min(best, (time.perf_counter() - start) / len(calls))
    distance = None
    if expected is not None:
        distance = max(relative_error(y, e) for y, e in zip(found, expected, strict=True)) ** 0.5
    return Timing(name, best * 1e3, weight_bytes(denoiser), distance)


def weight_bytes(denoiser: nn.Module) -> int:
    """Return the bytes of all parameters in memory, packed layers in all the forms that they hold."""
    layers = packed_layers(denoiser)
    packed = {id(layer.packed) for layer in layers.values()}
    rest = sum(p.nbytes for p in denoiser.parameters() if id(p) not in packed)
    return rest + sum(layer.held_bytes for layer in layers.values())
