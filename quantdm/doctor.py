"""What this machine has: versions, devices, which paths are fast here, and what is missing."""

import contextlib
import os
import platform
import shutil
import time
from importlib.util import find_spec
from typing import Any

import torch

from quantdm.denoisers.pipeline import known_pipelines
from quantdm.quantizers import quantize_weight
from quantdm.schemes import Scheme
from quantdm.search.run import cores, fast_dtype, versions

# What is not required, what it is for, and how to get it.
OPTIONAL = {
    "peft": ("LoRA on top of packed weights", "pip install peft"),
    "ray": ("trials on several machines", "pip install 'quantdm[ray]'"),
    "bitsandbytes": ("comparison with a peer", "pip install 'quantdm[peers]'"),
    "sdnq": ("comparison with a peer", "pip install 'quantdm[peers]'"),
}
_CPU_FEATURES = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512_f", "avx2")
SIZE = 768  # of the matrices that are timed


def examine_machine() -> dict[str, Any]:
    """Return versions, devices, measured speeds and what is missing on this machine, as flat readable values."""
    speeds = {str(dtype).removeprefix("torch."): _gflops(dtype) for dtype in (torch.float32, torch.bfloat16)}
    decoding = {label: _decode_speed(label) for label in ("uniform-channel-4", "kmeans-channel-4")}
    return {
        "python": platform.python_version(),
        **versions(),
        "processor": f"{platform.machine()}, {cores()} cores, {_memory_gb():.1f} GB memory",
        "processor features": ", ".join(_cpu_features()) or "none that help",
        "accelerator": _accelerator(),
        "matrix products": ", ".join(f"{name} {speed:.0f} GFLOP/s" for name, speed in speeds.items()) + " on a core",
        "decoding": ", ".join(f"{label} {speed:.0f}" for label, speed in decoding.items())
        + " million weights/s on a core",
        "images are generated in": fast_dtype(),
        "torch.compile": "usable" if _compiler() else "needs a C++ compiler; apt-get install g++",
        "embedded pipelines": ", ".join(known_pipelines()),
        "missing": "; ".join(missing()) or "nothing",
    }


def missing() -> list[str]:
    """Return the optional packages that are not installed, with their use and how to get them."""
    return [f"{name} ({use}): {remedy}" for name, (use, remedy) in OPTIONAL.items() if find_spec(name) is None]


def _accelerator() -> str:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GB"
    if torch.backends.mps.is_available():
        return "Apple GPU (mps)"
    built = torch.version.cuda
    return "none" if built is None else f"none that torch (built for CUDA {built}) can use; check the driver"


def _cpu_features() -> list[str]:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return [name for name in _CPU_FEATURES if capabilities.get(name)]


def _memory_gb() -> float:
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return float("nan")


def _compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)


def _seconds(call: Any) -> float:
    """Return the fastest of three calls, after one that warms up."""
    call()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _gflops(dtype: torch.dtype) -> float:
    a = torch.ones(SIZE, SIZE, dtype=dtype)
    with torch.no_grad():
        return 2e-9 * SIZE**3 / _seconds(lambda: a @ a) / torch.get_num_threads()


def _decode_speed(label: str) -> float:
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    quantized = quantize_weight(weight, Scheme.parse(label))
    out = torch.empty_like(weight)
    return 1e-6 * weight.numel() / _seconds(lambda: quantized.dequantize(out=out)) / torch.get_num_threads()
