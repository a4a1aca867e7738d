"""A Ray cluster: one that runs, or one of its own on this machine, and how many workers it has room for."""

import socket
from importlib.util import find_spec
from typing import Any

from quantdm.errors import QuantDMError

REACHED = 10.0  # seconds in which a cluster has to answer
STARTING = 300.0  # seconds that a cluster may take to give the first worker a place
EXPECTED = "expected auto, HOST:6379 or ray://HOST:10001 of one that runs (`ray status` there)"


def connect(address: str | None, workers: int | None) -> tuple[Any, bool]:
    """Return Ray, connected, and whether it was connected here: who did that disconnects.

    Args:
        address: of a cluster that runs ("auto": that of this machine; None: one of its own, which ends with the
            connection). A process that is connected stays where it is.
        workers: cores of a cluster of its own (None: all).

    Raises:
        QuantDMError: Ray is not installed, no such cluster, or this process is connected to another.
    """
    check_reachable(address)
    import ray

    if ray.is_initialized():
        _check_same(address, ray.get_runtime_context().gcs_address)
        return ray, False
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        settings |= {"num_cpus": workers, "include_dashboard": False}
    try:
        ray.init(address=address, **settings)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise _nowhere(address, error) from None
    return ray, True


def check_reachable(address: str | None) -> None:
    """Check, before anything is opened, that Ray is installed and that somebody listens at an address.

    Raises:
        QuantDMError: it is not, or nobody does; Ray itself would try for a minute.
    """
    if find_spec("ray") is None:
        raise QuantDMError("engine ray: the package ray is not installed; pip install 'quantdm[ray]'")
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdecimal():
            socket.create_connection((host, int(port)), timeout=REACHED).close()
    except (OSError, OverflowError) as error:
        raise _nowhere(address, error) from None


def _nowhere(address: str | None, error: Exception) -> QuantDMError:
    return QuantDMError(f"ray: no cluster at {address}: {str(error).splitlines()[0]:.200}; {EXPECTED}")


def room(ray: Any, workers: int | None, gpus: float | None) -> tuple[int, float]:
    """Return how many workers work, and the GPUs of each: as asked for, else what the cluster has room for now."""
    resources = ray.cluster_resources()
    each = gpus if gpus is not None else float(resources.get("GPU", 0) > 0)
    fit = int(resources.get("GPU", 0) / each) if each else int(resources.get("CPU", 0))
    return workers or max(fit, 1), each


def no_place(gpus: float) -> QuantDMError:
    """Return the error of a cluster that has no room for a worker."""
    return QuantDMError(
        f"ray: the cluster gave no worker a place in {STARTING:.0f} s (each needs 1 CPU, {gpus:g} GPU); see "
        "`ray status`, or ask for fewer GPUs per worker"
    )


def _check_same(address: str | None, connected: str) -> None:
    if address not in (None, "auto") and _resolved(address) != _resolved(connected):
        raise QuantDMError(
            f"ray address: got {address}, but this process is connected to {connected}; call ray.shutdown() first, or "
            "leave the address out"
        )


def _resolved(address: str | None) -> tuple[str, str]:
    host, _, port = (address or "").rpartition(":")
    try:
        return socket.gethostbyname(host), port
    except OSError:  # ray://HOST has no such address
        return host, port
