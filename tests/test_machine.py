"""The number format of a machine follows what is measured on it."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from itertools import count

import pytest
import torch

from quantdm import machine
from quantdm.machine import MARGIN, PROBE_ROUNDS, fast_dtype, faster_dtype, probe_seconds
from quantdm.runs.engines.local import ENVIRONMENT


def probe_of(float32: float, bfloat16: float) -> Callable[[torch.dtype], float]:
    return lambda dtype: float32 if dtype == torch.float32 else bfloat16


@pytest.mark.parametrize(
    ("float32", "bfloat16", "expected"),
    [(4.4, 1.7, "bfloat16"), (1.0, 1.0, "float32"), (1.7, 4.4, "float32"), (1.0, 0.99 / MARGIN, "bfloat16"),
     (1.0, 1.01 / MARGIN, "float32"), (0.001, 0.05, "float32")],
)  # fmt: skip
def test_the_choice_follows_the_measurement(float32: float, bfloat16: float, expected: str) -> None:
    assert faster_dtype(probe_of(float32, bfloat16)) == expected


@pytest.mark.parametrize("disturbed", [torch.float32, torch.bfloat16])
def test_a_busy_machine_does_not_change_it(disturbed: torch.dtype) -> None:
    rounds = count()
    quiet = probe_of(3.0, 1.0)

    def probe(dtype: torch.dtype) -> float:
        return quiet(dtype) + (4.0 if next(rounds) % 3 and dtype == disturbed else 0.0)

    assert faster_dtype(probe) == "bfloat16"


def test_a_format_that_is_emulated_is_not_timed_for_long() -> None:
    calls: list[torch.dtype] = []

    def probe(dtype: torch.dtype) -> float:
        calls.append(dtype)
        return 1.0 if dtype == torch.float32 else 50.0

    assert faster_dtype(probe) == "float32"
    assert calls.count(torch.bfloat16) < PROBE_ROUNDS / 2


def test_a_process_measures_once_and_keeps_its_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    fast_dtype.cache_clear()
    monkeypatch.setattr(machine, "probe_seconds", probe_of(3.0, 1.0))
    first = fast_dtype()
    monkeypatch.setattr(machine, "probe_seconds", probe_of(1.0, 3.0))
    assert fast_dtype() == first
    fast_dtype.cache_clear()  # other tests measure for themselves


def test_the_measurement_is_short_and_leaves_the_threads_alone() -> None:
    threads = torch.get_num_threads()
    assert 0 < min(probe_seconds(torch.float32) for _ in range(20)) < 0.01
    assert fast_dtype() in ("bfloat16", "float32")
    assert torch.get_num_threads() == threads


def test_a_worker_keeps_the_memory_that_activations_take_again_and_again():
    code = (
        "import resource\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for i in range(22):\n"
        "    first = faults() if i == 2 else None if i < 2 else first\n"
        "    made = bytes([i]) * 2**26\n"
        "    del made\n"
        "print(faults() - first)"
    )

    def counted(environment: dict[str, str]) -> int:
        given = {"PATH": os.environ["PATH"], **environment}
        return int(subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, check=True).stdout)

    kept, usual = counted(ENVIRONMENT), counted({})
    assert kept <= usual
    if platform.libc_ver()[0] == "glibc":
        assert kept < usual / 10
