"""The machine: cores, memory, devices, versions, and which number format is fast here."""

import contextlib
import ctypes
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.metadata import version
from threading import Condition
from typing import Any, Literal

import torch

from quantdm.errors import QuantDMError

_CPU_FEATURES = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512_f", "avx2")
SIZE = 768  # of the matrices that are timed
PROBE_ROUNDS = 8
MARGIN = 1.25  # a network gains less than its products do
HOPELESS = 5.0
# Weights that threads work on at a time, at up to 60 bytes each while they are sorted. A larger layer goes alone.
IN_FLIGHT, BYTES_PER_WEIGHT = 2**25, 60
# For the environment of processes that generate images: glibc would give the memory of every activation back and have
# every page of the next one cleared anew, a sixth of the processor time; other systems do not read these.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**28), "MALLOC_TRIM_THRESHOLD_": str(2**29)}


def accelerator() -> str:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GB"
    if torch.backends.mps.is_available():
        return "Apple GPU (mps)"
    built = torch.version.cuda
    return "none" if built is None else f"none that torch (built for CUDA {built}) can use; check the driver"


def cpu_features() -> list[str]:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return [name for name in _CPU_FEATURES if capabilities.get(name)]


def memory_gb() -> float:
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return float("nan")


def has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)


def fastest_of_three(call: Any) -> float:
    """Return the fastest of three calls, after one that warms up."""
    call()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def gflops(dtype: torch.dtype) -> float:
    a = torch.ones(SIZE, SIZE, dtype=dtype)
    with torch.no_grad():
        return 2e-9 * SIZE**3 / fastest_of_three(lambda: a @ a) / torch.get_num_threads()


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Give every thread of ours one of torch's: results do not depend on their number, and none of them spins."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def fast_dtype() -> Literal["bfloat16", "float32"]:
    """Return the dtype that generates images fastest here: what a GPU supports, what is measured on a processor.

    The answer is the same as long as the process lives.
    """
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    with one_torch_thread(), torch.no_grad():
        return faster_dtype(probe_seconds)


def faster_dtype(probe: Callable[[torch.dtype], float]) -> Literal["bfloat16", "float32"]:
    """Return bfloat16 if it is faster than float32 by a clear margin: by the minima of alternating rounds.

    Args:
        probe: returns the seconds of one round of work in a dtype.
    """
    best = {dtype: min(probe(dtype), probe(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    for _ in range(PROBE_ROUNDS):  # a neighbour who takes the processor meets both, and rarely all rounds of one
        if best[torch.bfloat16] > HOPELESS * best[torch.float32]:
            break  # emulated: some processors take fifty times as long
        for dtype in best:
            best[dtype] = min(best[dtype], probe(dtype))
    return "bfloat16" if best[torch.bfloat16] * MARGIN < best[torch.float32] else "float32"


def probe_seconds(dtype: torch.dtype) -> float:
    """Return the time of a product and of a convolution as denoisers have them, a millisecond or less."""
    tokens, weight = torch.ones(256, 256, dtype=dtype), torch.ones(512, 256, dtype=dtype)
    image, kernel = torch.ones(2, 32, 16, 16, dtype=dtype), torch.ones(32, 32, 3, 3, dtype=dtype)
    start = time.perf_counter()
    torch.nn.functional.linear(tokens, weight)
    torch.nn.functional.conv2d(image, kernel, padding=1)
    return time.perf_counter() - start


def load() -> float:
    """Return how many processes wanted a core in the last minute; 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def best_device() -> str:
    """Return where pipelines that are opened by name are put: "cuda" if there is any, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def same_devices(device: torch.device) -> list[str]:
    """Return the devices of this machine that are like one: every GPU for a GPU, itself for all else."""
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    return [f"cuda:{index}" for index in range(count)] or [str(device)]


def checked_device(name: str) -> str:
    """Return the name of a device that is there.

    Raises:
        QuantDMError: torch knows none of that name, or does not find it here.
    """
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition("Expected one of")[0] or "torch knows no such device"
        raise QuantDMError(f"device: got {name!r}, expected cpu, cuda, cuda:1 or mps; {reason:.120}") from None
    return name


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(
    names: Iterable[str] = ("quantdm", "torch", "diffusers", "transformers", "xgboost-cpu", "scipy"),
) -> dict[str, str]:
    """Return the versions that a result depends on, of packages that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(Exception):
            found[name] = version(name)
    return found


def single_thread() -> AbstractContextManager:
    """Run small linear algebra on one thread: on busy cores, waiting for other threads costs a hundred times more.

    It also makes results independent of the number of cores.
    """
    from threadpoolctl import threadpool_limits

    return threadpool_limits(limits=1)


@contextmanager
def seeded(seed: int, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Seed the global generators of the CPU and of these devices, and put their states back; no other is touched.

    `torch.manual_seed` would also reseed every accelerator that the process has or will have, for good.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for device in sorted({d for d in devices if d.type not in ("cpu", "meta")}, key=str):
            module = torch.get_device_module(device)
            place = () if device.type == "mps" else (device,)  # there is only one
            stack.callback(module.set_rng_state, module.get_rng_state(*place), *place)
            stack.enter_context(module.device(device) if place else contextlib.nullcontext())
            module.manual_seed(seed)
        torch.default_generator.manual_seed(seed)
        yield


class Gate:
    """Lets threads in while the weights they work on stay below a limit; one that exceeds it alone goes in alone."""

    def __init__(self, limit: int) -> None:
        self.limit, self.inside, self.changed = limit, 0, Condition()

    @contextmanager
    def room(self, size: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: self.inside == 0 or self.inside + size <= self.limit)
            self.inside += size
        try:
            yield
        finally:
            with self.changed:
                self.inside -= size
                self.changed.notify_all()


def free_bytes(device: torch.device) -> int:
    """Return how many bytes of a CUDA device nobody uses, those that torch keeps for later among them; of others 0."""
    if device.type != "cuda":
        return 0
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def give_back_freed() -> None:
    """Give the system what was freed and the C library keeps for later: after much of it, hundreds of megabytes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc's
    if trim is not None:
        trim(0)
