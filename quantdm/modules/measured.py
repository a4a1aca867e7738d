"""Which of two ways is faster on this machine: measured once for every shape, remembered in the user's cache."""

import contextlib
import functools
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from quantdm.errors import QuantDMError
from quantdm.files import read_json, write_json
from quantdm.machine import cpu_features
from quantdm.modules.kernels import Kernel

ROUNDS = 5
VERSION = 1

_log = logging.getLogger("quantdm")


def remembered(key: str, device: torch.device) -> str | None:
    """Return what `measure` found for this key on this machine, now or in an earlier process."""
    return _known().get(f"{_machine(device)}, {key}")


def measure(key: str, ways: Mapping[str, Callable[[], Any]], device: torch.device) -> str:
    """Return the name of the fastest of some ways to compute the same, and remember it.

    Each is run once to warm up, then in alternating rounds; its best round counts, the first wins ties.

    Args:
        key: says what is computed: kind, shapes, dtype. The machine is added to it.
        ways: name -> a call.
        device: where they run.
    """
    known = _known()
    known[f"{_machine(device)}, {key}"] = fastest = _measure(ways, device)
    _remember(known)
    return fastest


def cache_file() -> Path:
    """Return the file in which the choices for this user's machine are kept; it may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantdm" / "fastest.json"


def _measure(ways: Mapping[str, Callable[[], Any]], device: torch.device) -> str:
    best = dict.fromkeys(ways, float("inf"))
    for number in range(ROUNDS + 1):
        for name, call in ways.items():
            start = time.perf_counter()
            call()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if number:
                best[name] = min(best[name], time.perf_counter() - start)
    return min(best, key=lambda name: best[name])


@functools.cache
def _machine_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {' '.join(cpu_features())}"


def _machine(device: torch.device) -> str:
    kernels = "compiled" if Kernel.wanted else "eager"
    return f"{_machine_of(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, {kernels}"


@functools.cache
def _known() -> dict[str, str]:
    """Return what the cache says; a damaged one is thrown away."""
    try:
        return dict(read_json(cache_file(), version=VERSION)["fastest"])
    except (QuantDMError, OSError, KeyError, TypeError, ValueError):
        with contextlib.suppress(OSError):
            cache_file().unlink(missing_ok=True)
    return {}


def _remember(known: Mapping[str, str]) -> None:
    try:
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_json(cache_file(), {"version": VERSION, "fastest": dict(sorted(known.items()))})
    except (OSError, QuantDMError) as error:
        _log.warning("choices are measured again next time: %s", error)
