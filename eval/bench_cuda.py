"""What packed weights and 8-bit activations cost and save on a GPU: denoisers of PixArt's and SDXL's size at 1024 px.

    python eval/bench_cuda.py              # two or three minutes, wants a GPU
    python eval/bench_cuda.py --tiny       # small ones, on the processor too, no record: does the script still run?

One call of two images in bf16. Weights are random in their stored form, so nothing has to be quantized; the dense
denoiser has the same weights decoded. Every way runs as it is called and, where it can be captured, as a CUDA graph,
which leaves out what the processor does between kernels. Ways take turns; the median of ten counts, the best stands
beside it. Memory is what the allocator holds for the denoiser alone. Activations of linear layers only have 8 bits.
Writes eval/results/bench_cuda.json.
"""

import argparse
import copy
import datetime
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

from quantdm import ActivationSpec, Scheme, list_layers, set_activation_bits_, set_residency
from quantdm.files import write_json
from quantdm.machine import accelerator, versions
from quantdm.modules import quantize_module_
from quantdm.quantizers import QuantizedWeight, fused, stored_tensors

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.architectures import DIGITS, PUBLIC

OUT = Path(__file__).parent / "results" / "bench_cuda.json"
ROUNDS, WARM, IMAGES = 10, 2, 2
SMALL = 2**14  # weights of a layer below which it stays as it is
NAMES = ("pixart-xl-2", "sdxl")
SCHEMES = ("kmeans-channel-4", "uniform-channel-4")
DENSE, EAGER, FUSED, INTEGER = "dense", "packed, operation by operation", "packed", "8-bit activations, integers"
TINY: dict[str, dict[str, Any]] = {
    "pixart-xl-2": {
        "sample_size": 16, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16,
        "cross_attention_dim": 32,
    },
    "sdxl": DIGITS["digits-sd"][1] | {
        "sample_size": 16, "transformer_layers_per_block": 1, "cross_attention_dim": 2048, "attention_head_dim": 5,
    },
}  # fmt: skip
GOALS = {"packed over dense": 1.10, "weight bytes over dense": 0.35, "8-bit activations": 1.2}
Call = Callable[[], Tensor]


class Place(NamedTuple):
    """Where denoisers run, and whether they are small ones that nobody wants figures of."""

    device: torch.device
    tiny: bool

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Bfloat16 on a GPU; some processors emulate it, fifty times as slowly."""
        return torch.bfloat16 if self.is_gpu else torch.float32


def settings_of(name: str, tiny: bool) -> dict[str, Any]:
    return {**PUBLIC[name][1], "sample_size": 128, **(TINY[name] if tiny else {})}


def call_of(name: str, at: Place) -> dict[str, Any]:
    """Return the arguments of a call of two images."""
    side, given = settings_of(name, at.tiny)["sample_size"], {"device": at.device, "dtype": at.dtype}
    rng = torch.Generator(at.device).manual_seed(0)
    latents = torch.randn(IMAGES, 4, side, side, generator=rng, **given)
    call: dict[str, Any] = {"timestep": torch.full((IMAGES,), 500, device=at.device), "return_dict": False}
    if name.startswith("pixart"):
        text = torch.randn(IMAGES, 120, 4096, generator=rng, **given)
        added = {"resolution": None, "aspect_ratio": None}
        return call | {"hidden_states": latents, "encoder_hidden_states": text, "added_cond_kwargs": added}
    text = torch.randn(IMAGES, 77, 2048, generator=rng, **given)
    pooled = torch.randn(IMAGES, 1280, generator=rng, **given)
    added = {"text_embeds": pooled, "time_ids": torch.ones(IMAGES, 6, **given)}
    return call | {"sample": latents, "encoder_hidden_states": text, "added_cond_kwargs": added}


def random_weight(shape: tuple[int, ...], scheme: Scheme, split: int | None, at: Place) -> QuantizedWeight:
    """Return a weight in its stored form: random codes, values of about N(0, 0.02^2)."""
    rng, k, device = torch.Generator(at.device).manual_seed(len(shape)), 2**scheme.bits, at.device
    tensors = {}
    for name, (size, dtype) in stored_tensors(shape, scheme, split).items():
        kind = name.partition(".")[0]
        if kind == "codes":
            tensors[name] = torch.randint(256, size, generator=rng, device=device, dtype=torch.uint8)
        elif kind == "codebook":
            table = torch.linspace(-127, 127, size[-1], device=device).round()
            tensors[name] = table.to(dtype).expand(size).contiguous()
        else:
            step = 0.035 / (127 if scheme.method == "kmeans" else k / 2)
            value = {"scale": step, "zero_point": k // 2, "factor": 1.0}[kind]
            tensors[name] = torch.full(size, value, dtype=dtype, device=device)
    return QuantizedWeight(scheme, shape, split, at.dtype, tensors)


def held(at: Place) -> int:
    """Return the bytes that tensors hold on the GPU; 0 on a processor."""
    gc.collect()
    return torch.cuda.memory_allocated(at.device) if at.is_gpu else 0


def denoiser(name: str, scheme: Scheme, at: Place) -> tuple[nn.Module, dict[str, Any]]:
    """Return a packed denoiser, and the bytes that it holds and that it held before its weights were packed."""
    before = held(at)
    torch.manual_seed(0)
    with at.device:
        model = getattr(diffusers, PUBLIC[name][0])(**settings_of(name, at.tiny)).to(at.dtype).eval()
    dense, layers = held(at), list_layers(model)
    large = [layer for layer in layers if layer.num_weights >= SMALL]
    for layer in large:
        quantize_module_(model, layer.name, random_weight(layer.shape, scheme, layer.split, at))
    figures = {"layers": len(layers), "packed_layers": len(large)}
    return model, figures | {"dense_bytes": dense - before, "packed_bytes": held(at) - before}


def milliseconds(call: Callable[[], object], at: Place) -> float:
    """Return the milliseconds of one call: between two events on a GPU."""
    if not at.is_gpu:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def in_turns(ways: Mapping[str, Callable[[], object]], at: Place) -> dict[str, dict[str, float]]:
    """Return the median and the best milliseconds of every way."""
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for number in range((1 if at.tiny else ROUNDS) + WARM):
        for way, call in ways.items():
            ms = milliseconds(call, at)
            if number >= WARM:
                taken[way].append(ms)
    return {way: {"ms": round(statistics.median(ms), 3), "best": round(min(ms), 3)} for way, ms in taken.items()}


def captured(call: Call, at: Place) -> tuple[torch.cuda.CUDAGraph, Tensor] | str:
    """Return a graph of a call and the output that it writes, or why there is none."""
    if not at.is_gpu:
        return "no GPU"
    for _ in range(WARM):
        call()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(at.device)
    try:
        with torch.cuda.graph(graph):
            out = call()
    except RuntimeError as error:
        return str(error).splitlines()[0][:120]
    return graph, out


def timed(calls: Mapping[str, Call], at: Place) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the rows of some ways, plain and as graphs, and the outputs of the graphs that there are."""
    graphs = {way: captured(call, at) for way, call in calls.items()}
    ways: dict[str, Callable[[], object]] = dict(calls)
    ways |= {f"{way}|graph": graph[0].replay for way, graph in graphs.items() if not isinstance(graph, str)}
    found = in_turns(ways, at)
    rows: dict[str, Any] = {}
    for way, graph in graphs.items():
        rows[way] = {"plain": found[way], "graph": found.get(f"{way}|graph")}
        if isinstance(graph, str):
            rows[way]["not_captured"] = graph
    return rows, {way: graph[1] for way, graph in graphs.items() if not isinstance(graph, str)}


def measure(name: str, label: str, at: Place) -> dict[str, Any]:
    """Return the rows of dense and packed weights of one denoiser under one scheme."""
    call = call_of(name, at)
    model, figures = denoiser(name, Scheme.parse(label), at)
    dense = copy.deepcopy(model)
    set_residency(dense, "dense")

    def by(kernel: bool) -> Call:
        def forward() -> Tensor:
            fused.wanted = kernel
            return model(**call)[0]

        return forward

    calls: dict[str, Call] = {DENSE: lambda: dense(**call)[0], EAGER: by(False), FUSED: by(True)}
    rows, outputs = timed(calls, at)
    expected = calls[DENSE]()
    for way, forward in calls.items():
        rows[way]["difference"] = float((forward() - expected).abs().max())
        if way in outputs:
            rows[way]["graph_difference"] = float((outputs[way] - expected).abs().max())
    return {"rows": rows, "kernel": uses_kernel(at), "output_sd": round(float(expected.float().std()), 4), **figures}


def uses_kernel(at: Place) -> bool:
    """Whether a packed weight is decoded by the kernel here, or operation by operation whatever is wanted."""
    weight = random_weight((64, 64), Scheme.parse(SCHEMES[0]), None, at)
    return fused.decode_(torch.empty(64, 64, device=at.device), weight.scheme, weight.tensors, 1.0)


def integers(name: str, at: Place) -> tuple[Call, dict[str, Any]]:
    """Return a call with 8 bits per token in linear layers, multiplied in integers, and how many layers do not."""
    call = call_of(name, at)
    model, figures = denoiser(name, Scheme.parse(SCHEMES[0]), at)
    linear = [layer.name for layer in list_layers(model) if layer.kind == "linear" and layer.num_weights >= SMALL]
    set_activation_bits_(model, ActivationSpec(layers=dict.fromkeys(linear, "token-8")))
    rest = set_residency(model, "integer")
    left = {"quantized_inputs": len(linear), "of_these_without_integers": len(set(linear) & set(rest))}
    return lambda: model(**call)[0], {"layers": figures["layers"], **left}


def table_of(models: Mapping[str, Any]) -> str:
    """Return what was found, one line a way."""
    lines = [f"{'ms per call: median, best':62} {'plain':>17} {'graph':>17} {'differs':>8}"]
    for title, found in models.items():
        for way, row in found["rows"].items():
            cells = [f"{r['ms']:8.2f} {r['best']:8.2f}" if r else f"{'-':>17}" for r in (row["plain"], row["graph"])]
            differs = f"{row['difference']:8.2g}" if "difference" in row else f"{'-':>8}"
            lines.append(f"{title + ', ' + way:62} {cells[0]} {cells[1]} {differs}")
        if found.get("dense_bytes"):
            packed, dense = (found[f"{kind}_bytes"] / 1e6 for kind in ("packed", "dense"))
            lines.append(f"{title + ', MB held':62} {packed:.0f} of {dense:.0f}: {packed / dense:.3f}")
        if not found.get("kernel", True):
            lines.append(f"{title}: the kernel was NOT used, both packed rows are operation by operation")
    return "\n".join(lines)


class Notes:
    """What was found so far; written whenever there is more."""

    def __init__(self, out: Path | None) -> None:
        self.found, self._out, self._start = dict[str, Any](), out, time.monotonic()

    def add(self, title: str, row: dict[str, Any]) -> None:
        self.found[title] = row
        print(f"[{time.monotonic() - self._start:.0f} s] {title}: {row}", flush=True)
        if self._out is not None:
            write_json(self._out, record(self.found))


@torch.inference_mode()
def bench(notes: Notes, at: Place) -> None:
    for name in NAMES:
        for label in SCHEMES:
            notes.add(f"{name}, {label}", measure(name, label, at))
    print(table_of(notes.found), flush=True)
    # Plain before captured: a capture that fails may leave the device's random numbers unusable.
    made = {f"{name}, {SCHEMES[0]}, A8": integers(name, at) for name in NAMES}
    for title, (call, figures) in made.items():
        row = {"plain": in_turns({INTEGER: call}, at)[INTEGER], "graph": None}
        notes.add(title, {"rows": {INTEGER: row}, **figures})
    for title, (call, _) in made.items():
        row, graph = notes.found[title]["rows"][INTEGER], captured(call, at)
        failed = isinstance(graph, str)
        row |= {"not_captured": graph} if failed else {"graph": in_turns({INTEGER: graph[0].replay}, at)[INTEGER]}
        notes.add(title, notes.found[title])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("-o", "--out", type=Path, default=OUT)
    given = parser.parse_args()
    at = Place(torch.device(given.device), given.tiny)
    if not at.is_gpu and not at.tiny:
        raise SystemExit("bench_cuda: no GPU here; --tiny runs small denoisers on the processor")
    notes, before = Notes(None if at.tiny else given.out), fused.wanted
    try:
        bench(notes, at)
    finally:
        fused.wanted = before
        print(table_of(notes.found), flush=True)


def record(found: dict[str, Any]) -> dict[str, Any]:
    """Return what is written."""
    return {
        "version": 2, "call": f"{IMAGES} images of 1024 px, bf16, random weights", "goals": GOALS, "models": found,
        "rounds": ROUNDS, "machine": accelerator(), "versions": versions(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
