"""What this machine has: versions, devices, which paths are fast here, and what is missing."""

import platform
from importlib.util import find_spec
from typing import Any

import torch

from quantdm.machine import (
    SIZE,
    accelerator,
    cores,
    cpu_features,
    fast_dtype,
    fastest_of_three,
    gflops,
    has_compiler,
    memory_gb,
    versions,
)
from quantdm.pipelines.known import known_pipelines
from quantdm.quantizers import quantize_weight
from quantdm.schemes import Scheme

# What is not required, what it is for, and how to get it.
OPTIONAL = {
    "peft": ("LoRA on top of packed weights", "pip install peft"),
    "bitsandbytes": ("comparison with a peer", "pip install 'quantdm[peers]'"),
    "sdnq": ("comparison with a peer", "pip install 'quantdm[peers]'"),
}


def examine_machine() -> dict[str, Any]:
    """Return versions, devices, measured speeds and what is missing on this machine, as flat readable values."""
    speeds = {str(dtype).removeprefix("torch."): gflops(dtype) for dtype in (torch.float32, torch.bfloat16)}
    decoding = {label: _decode_speed(label) for label in ("uniform-channel-4", "kmeans-channel-4")}
    return {
        "python": platform.python_version(),
        **versions(),
        "processor": f"{platform.machine()}, {cores()} cores, {memory_gb():.1f} GB memory",
        "processor features": ", ".join(cpu_features()) or "none that help",
        "accelerator": accelerator(),
        "matrix products": ", ".join(f"{name} {speed:.0f} GFLOP/s" for name, speed in speeds.items()) + " on a core",
        "decoding": ", ".join(f"{label} {speed:.0f}" for label, speed in decoding.items())
        + " million weights/s on a core",
        "images are generated in": fast_dtype(),
        "torch.compile": "usable" if has_compiler() else "needs a C++ compiler; apt-get install g++",
        "embedded pipelines": ", ".join(known_pipelines()),
        "missing": "; ".join(missing()) or "nothing",
    }


def missing() -> list[str]:
    """Return the optional packages that are not installed, with their use and how to get them."""
    return [f"{name} ({use}): {remedy}" for name, (use, remedy) in OPTIONAL.items() if find_spec(name) is None]


def _decode_speed(label: str) -> float:
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    quantized = quantize_weight(weight, Scheme.parse(label))
    out = torch.empty_like(weight)
    return 1e-6 * weight.numel() / fastest_of_three(lambda: quantized.dequantize(out=out)) / torch.get_num_threads()
