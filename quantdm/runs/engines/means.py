"""What a run may use, before it starts: workers and accelerators of an engine, and how fast they are."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from quantdm.errors import QuantDMError
from quantdm.machine import same_devices
from quantdm.pipelines.generate import generate
from quantdm.pipelines.loading import DiffusionPipeline
from quantdm.pipelines.protocol import Protocol
from quantdm.pipelines.subject import Subject
from quantdm.pipelines.tried import fewest_steps
from quantdm.runs.engines.answer import answered, value_of
from quantdm.runs.engines.cluster import STARTING, connect, no_place, room
from quantdm.runs.engines.local import workers_on
from quantdm.runs.run import Run, RunSettings

PROBE_SECONDS, PROBE_IMAGES = 1.0, 64


@dataclass(frozen=True)
class Speed:
    """Seconds of one image's step: in the dtype in which the pipeline is opened, and in that of the run."""

    exact: float
    fast: float


@dataclass(frozen=True)
class Means:
    """How many workers there are and how many accelerators, the speed of this process and of a worker."""

    workers: int
    accelerators: float
    here: Speed
    there: Speed


def speed_of(subject: Subject, settings: RunSettings, batch_size: int | Literal["auto"]) -> Speed:
    """Generate a few images, and return how fast that was."""
    pipe = subject.in_dtype(settings.torch_dtype)
    exact = seconds_per_step(subject.pipe, settings.protocol, batch_size)
    fast = exact if pipe is subject.pipe else seconds_per_step(pipe, settings.protocol, batch_size)
    return Speed(exact, fast)


def seconds_per_step(pipe: DiffusionPipeline, protocol: Protocol, batch_size: int | Literal["auto"] = "auto") -> float:
    """Measure the seconds of one image's step: one image first, then twice as many while that stays short.

    Two steps are made, or as many as it takes: of a picture that is changed a little, most are left out.
    """
    images, steps = 1, fewest_steps(pipe, protocol, min(2, protocol.steps))
    while True:
        start = time.monotonic()
        generate(pipe, protocol, range(images), steps=steps, batch_size=batch_size)
        took = time.monotonic() - start
        if took > PROBE_SECONDS / 2 or images >= PROBE_IMAGES:
            return took / images / steps
        images *= 2


class Gauge:
    """A worker of a cluster before there is a run: it says how fast it is.

    Args:
        device: where the pipeline is loaded.
    """

    def __init__(self, device: str) -> None:
        torch.set_num_threads(1)
        self._device = device

    def ready(self) -> bool:
        """Say that it has a place."""
        return True

    def speed(self, settings: dict[str, Any], batch_size: int | Literal["auto"]) -> dict[str, Any]:
        """Open the pipeline of a run's settings and answer with its speed here."""

        def measured() -> list[float]:
            asked = RunSettings.model_validate(settings)
            found = speed_of(Run(".", asked).open_subject(device=self._device), asked, batch_size)
            return [found.exact, found.fast]

        return answered(measured)


def look_at_means(
    subject: Subject,
    settings: RunSettings,
    engine: str,
    *,
    workers: int | None,
    batch_size: int | Literal["auto"],
    ray_address: str | None = None,
    say: Callable[[str], object] = print,
) -> Means:
    """Return what an engine would have for a run; a few images are generated here, and on a worker that is elsewhere.

    Raises:
        QuantDMError: the pipeline refuses the protocol's call, here or on a worker; no cluster, or no place there.
    """
    here = speed_of(subject, settings, batch_size)
    if engine == "local" or ray_address is None:  # a cluster of its own is this machine
        devices = same_devices(subject.device)
        many = workers_on(subject, devices, workers)
        if subject.device.type == "cpu":
            return Means(many, 0.0, here, here)
        shared = many // len(devices)  # how much faster several on one accelerator are is not known before
        return Means(many, float(len(devices)), here, Speed(here.exact * shared, here.fast * shared))
    ray, connected = connect(ray_address, None)
    try:
        many, gpus = room(ray, workers, None)
        if settings.location:
            there = _speed_there(ray, settings, gpus, batch_size)
        else:
            say("       the pipeline was changed after loading and lies on this machine: the speed is that of here")
            there = here
        return Means(many, many * gpus, here, there)
    finally:
        if connected:
            ray.shutdown()


def _speed_there(ray: Any, settings: RunSettings, gpus: float, batch_size: int | Literal["auto"]) -> Speed:
    gauge = ray.remote(Gauge).options(num_cpus=1, num_gpus=gpus).remote("cuda" if gpus else "cpu")
    try:
        if not ray.wait([gauge.ready.remote()], timeout=STARTING)[0]:
            raise no_place(gpus)
        return Speed(*value_of(ray.get(gauge.speed.remote(settings.model_dump(mode="json"), batch_size))))
    except ray.exceptions.RayError as error:
        raise QuantDMError(f"ray: a worker was lost when its speed was measured: {error!s:.300}") from None
    finally:
        ray.kill(gauge)
