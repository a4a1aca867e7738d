"""What a run will take, before anything starts: time, memory and disk of every stage, from a few images."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from quantdm.bank.weight_bank import CACHE_BYTES
from quantdm.correction.fit import GLANCE
from quantdm.corridor.levels import Level
from quantdm.denoisers.inventory import LayerRecord
from quantdm.errors import QuantDMError, counted
from quantdm.machine import cores, load
from quantdm.pipelines.generate import most_at_once
from quantdm.pipelines.sizes import bytes_per_image
from quantdm.pipelines.subject import Subject
from quantdm.progress import duration
from quantdm.quantizers import Moments, count_bits, quantize_options
from quantdm.runs.cheap import EVERY
from quantdm.runs.engines.means import Means
from quantdm.runs.evaluator import NOISE_CALLS
from quantdm.runs.room import Room, room_of
from quantdm.runs.run import RunSettings
from quantdm.runs.sensitivities import AROUND, needed_passes
from quantdm.runs.shares import SIZES
from quantdm.runs.trials import FRONTIER_SHARE, RANDOM_SHARE
from quantdm.schemes import ORIGINAL

PROBE_ROWS = 64
CANDIDATES, SURVIVORS = 13, 5  # of the verification: those of a usual run, and how many run further draws
PLAIN_ROWS, ROUNDED_ROWS = 7, 2  # of the result: with and without quantized activations
ROUNDED = 1.6  # what quantized activations cost, times the plain denoiser: measured on digits-dit
TRIED = 6  # corrections, each on two of four draws where it does not help on both
UNLEARNED = RANDOM_SHARE + FRONTIER_SHARE  # of the trials: those that get cheap labels
NO_ACCELERATOR = "gpu_hours (--gpu-hours): no accelerator works here; give minutes (--minutes) instead"
CHEAP = f"Trials: if cheap labels rank like full ones; else they take up to {EVERY} times as long."

GUIDED = 2  # samples of an image that a denoiser sees: with and without its prompt

PARALLEL = ("sensitivities", "other parts", "trials", "verification", "correction", "final rows")


@dataclass(frozen=True)
class Stage:
    """One stage: seconds, and bytes of memory and disk."""

    name: str
    seconds: float
    memory: int
    disk: int


@dataclass(frozen=True)
class Plan:
    """The stages of a run in their order, and its trials."""

    stages: tuple[Stage, ...]
    trials: int
    workers: int
    accelerators: float = 0.0
    note: str = ""
    load: float = 0.0  # processes that wanted a core before
    room: Room | None = None  # of a target for the whole pipeline

    def record(self) -> dict[str, Any]:
        """Return plain numbers."""
        means = {"workers": self.workers, "accelerators": self.accelerators, "load": self.load}
        shared = {} if self.room is None else {"split": self.room.record()}
        return {"estimate": True, **means, "stages": [asdict(stage) for stage in self.stages], **shared}

    def said(self, say: Callable[[str], object], most: Callable[[int], int] | None = None) -> dict[str, Any]:
        """Say the plan, and how many trials time allows, if that says `most`; return its record."""
        if most is not None:
            most(0)
        say(self.text())
        return self.record()

    def text(self) -> str:
        """Return one line per stage, and the sums."""
        lines = [f"{'stage':<16}{'time':>12}{'memory':>12}{'disk':>12}"]
        whole = Stage("all", *self._sums())
        for stage in (*self.stages, whole):
            memory, disk = (f"{size / 1e6:,.0f} MB" for size in (stage.memory, stage.disk))
            lines.append(f"{stage.name:<16}{duration(stage.seconds):>12}{memory:>12}{disk:>12}")
        lines.append(f"An estimate, from a few images generated just now; {counted(self.workers, 'worker')}.")
        if self.load > cores() + 1:
            lines.append(f"This machine is busy (load {self.load:.0f}); without its other work that takes less time.")
        lines += [self.note] if self.note else []
        return "\n".join(lines if self.room is None else [*lines, self.room.text()])

    def _sums(self) -> tuple[float, int, int]:
        return (
            sum(s.seconds for s in self.stages),
            max(s.memory for s in self.stages),
            sum(s.disk for s in self.stages),
        )

    def within(
        self, start: float, minutes: float | None, gpu_hours: float | None, say: Callable[[str], object]
    ) -> Callable[[int], int] | None:
        """Return `trials_within` of a budget that began at `start`; None: there is none."""
        if gpu_hours is not None:
            minutes = gpu_minutes(gpu_hours, self.accelerators)
        return None if minutes is None else self.trials_within(start + 60 * minutes, say)

    def trials_within(self, end: float, say: Callable[[str], object]) -> Callable[[int], int]:
        """Return what says how many trials fit before `end` (of the monotonic clock), the later stages left their time.

        It is asked before the first trial, with 0, and when some are done: from then on the measured rate counts.
        """
        names = [stage.name for stage in self.stages]
        place = names.index("trials")
        later = sum(stage.seconds for stage in self.stages[place + 1 :])
        each = self.stages[place].seconds / self.trials
        began: list[float] = []

        def most(done: int) -> int:
            now = time.monotonic()
            began.append(now)
            rate = (now - began[0]) / done if done else each
            fits = done + max(int((end - later - now) / max(rate, 1e-9)), 0)
            if fits < self.trials:
                kept = "what is measured is kept, go on any time"
                say(f"       time allows {fits} of {counted(self.trials, 'trial')}; {kept}")
            return fits

        return most


def gpu_minutes(gpu_hours: float, accelerators: float) -> float:
    """Return the minutes in which accelerators together work so many hours.

    Raises:
        QuantDMError: there is none.
    """
    if not accelerators:
        raise QuantDMError(NO_ACCELERATOR)
    return 60 * gpu_hours / accelerators


def plan_run(
    subject: Subject,
    settings: RunSettings,
    level: Level,
    means: Means,
    *,
    tuned: bool,
    batch_size: int | Literal["auto"] = "auto",
) -> Plan:
    """Estimate a run stage by stage, from what an engine has; some rows of one layer are quantized for it.

    Raises:
        QuantDMError: the pipeline refuses the protocol's call.
    """
    busy = load()
    pipe = subject.in_dtype(settings.torch_dtype)
    room = _room(subject, settings)
    seconds = _seconds(subject, settings, level if tuned else replace(level, tune_images=0), means, room)
    weights = sum(map(_bytes, subject.denoisers.values()))
    held = weights + (0 if pipe is subject.pipe else weights * settings.torch_dtype.itemsize // 4)
    quantizable = sum(layer.num_weights for layer in subject.layers)
    held += min(CACHE_BYTES, quantizable * settings.torch_dtype.itemsize * len(settings.schemes))  # decoded weights
    held += bytes_per_image(pipe, settings.protocol) * most_at_once(pipe, settings.protocol, batch_size)
    disk = _disk(subject, settings) | ({} if room is None else {"export, report": room.target})
    return Plan(
        tuple(
            Stage(name, time_, held * (means.workers if name in PARALLEL else 1), disk.get(name, 10**6))
            for name, time_ in seconds.items()
        ),
        settings.trials,
        means.workers,
        means.accelerators,
        CHEAP if settings.fidelity == "auto" else "",
        busy,
        room,
    )


def _room(subject: Subject, settings: RunSettings) -> Room | None:
    """Return what the target of a whole pipeline leaves for its denoisers; None: it is the target of these alone."""
    if settings.target_pipeline_bytes is None:
        return None
    return room_of(subject, settings.schemes, settings.table_scheme, settings.target_pipeline_bytes)


def _seconds(subject: Subject, s: RunSettings, level: Level, means: Means, room: Room | None) -> dict[str, float]:
    """Return the seconds of every stage: what workers share at their speed, all else at that of this process."""
    layers, steps, tune = len(subject.layers), s.protocol.steps, level.tune
    here, there, many = means.here, means.there, means.workers
    rows = (PLAIN_ROWS + ROUNDED_ROWS * ROUNDED) * 2.3 + 3  # some stop after two of three draws; three references
    corrected, verified = level.correction_images * steps, s.verify_images * s.steps_of_verification
    tried = 4 + ROUNDED * (4 + 3 * TRIED)  # four draws of full precision and without a correction
    trained = level.tune_images * steps + tune.steps * tune.rows * 3 if level.tune_images else 0
    calibrated = s.calibration_images * (s.calibration_steps or s.label_steps) * 2
    probe = NOISE_CALLS * s.noise_images * there.exact
    label = s.label_images * s.label_steps * there.fast
    shared = 0 if room is None else SIZES + sum(len(row) - 1 for row in room.parts.values())
    full, cheap = (s.trials, 0.0) if s.fidelity == "full" else (s.trials / EVERY, s.trials * UNLEARNED)
    return {
        "bank": calibrated * here.exact + _bank_seconds(subject, s) / cores(),
        "sensitivities": _sensitivity_seconds(subject, s, there.exact, many),
        **({} if room is None else {"other parts": shared * label / many}),
        "trials": (full * label + cheap * probe) / many,
        "surrogates": 2 + s.trials * layers * 5e-4,
        "verification": (CANDIDATES + SURVIVORS * (s.verify_draws - 1)) * verified * there.fast / many,
        "tuning": trained * here.exact,
        "correction": corrected * ((2 + ROUNDED) * here.fast + tried * there.fast / min(many, GLANCE)),
        "final rows": rows * level.final_images * steps * there.fast / many,
        "export, report": 10.0,
    }


def _sensitivity_seconds(subject: Subject, s: RunSettings, exact: float, workers: int) -> float:
    """Return the seconds of the one-layer errors: of backward passes, the first of which runs alone, or one by one."""
    samples, options = NOISE_CALLS * s.noise_images, sum(scheme != ORIGINAL for scheme in s.schemes)
    layers, parts, signs = len(subject.layers), len(subject.denoisers), s.noise_signs
    passes = None if signs is None else needed_passes(GUIDED * samples, signs, layers=layers / parts, options=options)
    if passes is None:
        return layers * options * samples * exact / workers
    return (1 + math.ceil((passes - 1) / workers)) * samples * parts * (AROUND + options) * exact


def _disk(subject: Subject, settings: RunSettings) -> dict[str, int]:
    """Return the bytes that the large stages leave."""
    layers = subject.layers
    bits = sum(count_bits(layer.shape, scheme, layer.split) for layer in layers for scheme in settings.bank_schemes)
    moments = sum(4 * (layer.num_weights // layer.shape[0]) ** 2 for layer in layers)
    kept = sum(_bytes(part) for part in subject.pipe.components.values() if isinstance(part, nn.Module))
    quantized = sum(layer.num_weights for layer in layers)
    size = torch.finfo(subject.dtype).bits // 8
    return {
        "bank": bits // 8 + moments,
        "export, report": int(kept - size * quantized + quantized * settings.target_bits / 8),
    }


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _bank_seconds(subject: Subject, settings: RunSettings) -> float:
    """Return the seconds of quantizing every layer on one core, from some rows of the layer of median size."""
    ordered: list[LayerRecord] = sorted(subject.layers, key=lambda layer: layer.num_weights)
    layer = ordered[len(ordered) // 2]
    weight = subject.weights.get_parameter(f"{layer.name}.weight").detach()[:PROBE_ROWS].float().cpu()
    width = weight[0].numel()
    moments = Moments(torch.eye(width)[None], width)
    start = time.monotonic()
    quantize_options(
        weight, settings.bank_schemes, split=layer.split, name=layer.name, moments=moments, sweeps=settings.sweeps
    )
    return (time.monotonic() - start) * sum(each.num_weights for each in ordered) / weight.numel()
