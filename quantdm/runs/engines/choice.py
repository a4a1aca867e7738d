"""Which engine measures: the processes of this machine, or a Ray cluster."""

from typing import Literal

from quantdm.errors import QuantDMError, nearest
from quantdm.pipelines.subject import Subject
from quantdm.runs.engines.cluster import check_reachable
from quantdm.runs.engines.local import Engine
from quantdm.runs.run import SNAPSHOT, Run

ENGINES = ("local", "ray")


def check_engine(engine: str, ray_address: str | None) -> None:
    """Check, before anything is opened, that there is such an engine.

    Raises:
        QuantDMError: there is none of that name, its package is not installed, nobody listens at the address, or one
            is given to an engine that takes none.
    """
    if engine not in ENGINES:
        raise QuantDMError(f"engine: got {engine!r}; {nearest(engine, ENGINES)}")
    if ray_address is not None and engine != "ray":
        raise QuantDMError(f"ray address: got {ray_address!r} for the engine {engine}; expected engine ray")
    if engine == "ray":
        check_reachable(ray_address)


def open_engine(
    run: Run,
    subject: Subject,
    engine: str,
    *,
    workers: int | None,
    batch_size: int | Literal["auto"],
    ray_address: str | None = None,
    gpus: float | None = None,
) -> Engine:
    """Return an engine by its name; use it as a context manager.

    Raises:
        QuantDMError: no such engine, its package is not installed, or its cluster cannot be reached; a live pipeline of
            a class that processes cannot open again.
    """
    check_engine(engine, ray_address)
    kind = type(subject.pipe)
    is_own = kind.__module__.partition(".")[0] not in ("diffusers", "quantdm")
    if is_own and subject.location == str(run.path(SNAPSHOT).resolve()) and (workers != 1 or engine != "local"):
        raise QuantDMError(
            f"{kind.__name__}: is a class of your own, and other processes open a pipeline by its class in diffusers; "
            "pass workers=1"
        )
    if engine == "local":
        return Engine(run, subject, workers=workers, batch_size=batch_size)
    from quantdm.runs.engines.ray import RayEngine

    return RayEngine(run, subject, address=ray_address, workers=workers, gpus=gpus, batch_size=batch_size)
